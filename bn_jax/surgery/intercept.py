"""A model whose layers are called through a function, without touching its source.

What every operation that runs a model rests on: Linen's interceptors and, for NNX, a
subclass in place of the layer's class, which leaves the structure of the variables alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
from flax import nnx
from flax.linen import transforms

import bn_jax.linen
import bn_jax.nnx

Path = tuple[str | int, ...]
SOWN = "bn_jax.surgery"
OURS = (bn_jax.linen.BatchNorm, bn_jax.nnx.BatchNorm)
GHOSTS = (bn_jax.linen.GhostBatchNorm, bn_jax.nnx.GhostBatchNorm)
RENORMS = (bn_jax.linen.BatchRenorm, bn_jax.nnx.BatchRenorm)
BATCH_NORMS = (nn.BatchNorm, nnx.BatchNorm, *OURS)  # of which the others are subclasses


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
      path: of the layer, in the variables.
      layer: the module.
      args, kwargs: what it is called with.
      next: what it would have called.
    """

    path: Path
    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    next: Callable[..., Any]

    @property
    def x(self) -> jax.Array:
        """The input."""
        return self.args[0] if self.args else self.kwargs[_first(self.layer)]

    @property
    def use_running_average(self) -> bool | None:
        """Of a BatchNorm: what the call says or, where it does not, the layer."""
        said = self.args[1] if len(self.args) > 1 else self.kwargs.get("use_running_average")
        return self.layer.use_running_average if said is None else said

    def replace_x(self, x: jax.Array) -> Call:
        """The call with another input."""
        if self.args:
            return self._replace(args=(x, *self.args[1:]))
        return self._replace(kwargs={**self.kwargs, _first(self.layer): x})

    def proceed(self, use_running_average: bool | None = None) -> Any:
        """What the layer returns, a BatchNorm in the given mode if one is given."""
        if use_running_average is None:
            return self.next(*self.args, **self.kwargs)
        others = ("use_running_average", _first(self.layer))
        kwargs = {k: v for k, v in self.kwargs.items() if k not in others}
        # Linen takes it from the constructor or from the call, and not from both.
        with attributes(self.layer, use_running_average=use_running_average):
            return self.next(self.x, **kwargs)


def _first(layer):
    """The name of the first argument."""
    return list(inspect.signature(type(layer).__call__).parameters)[1]


def spelled(path: Path) -> str:
    """A path as one writes it."""
    return "/".join(map(str, path)) or "the model itself"


Hook = Callable[[Call], Any]


@contextlib.contextmanager
def attributes(module: Any, **values: Any):
    """Within it a module has other attributes, though it is frozen."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, v in values.items():
            object.__setattr__(module, name, v)
        yield
    finally:
        for name, v in before.items():
            object.__setattr__(module, name, v)


def intercept(
    model: Model, variables: Any, hook: Hook, kinds: tuple[type, ...] = BATCH_NORMS
) -> Model:
    """A model with the same variables, whose layers of `kinds` return what `hook` returns.

    Of a model that is intercepted already the new hook is the inner one: it is given what
    the model makes of its layers, a frozen one called with its running statistics, one that
    is folded away not at all.

    Args:
      model, variables: see `bn_jax.surgery`.
      hook: is given each `Call`; `call.proceed()` is what the layer returns by itself.
      kinds: layer classes.
    """
    if isinstance(model, Intercepted):
        return Intercepted(model.model, (*model.hooks, (hook, kinds)))
    if isinstance(model, nn.Module):
        return Intercepted(model, ((hook, kinds),))
    module = nnx.merge(model, variables, copy=True)
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, kinds):
            _intercept_nnx(layer, path, hook)
    return nnx.graphdef(module)


def apply(model: Model, variables: Any, *inputs: Any, **call: Any) -> Any:
    """What the model returns; nothing that it does to its variables is kept."""
    return apply_and_update(model, variables, *inputs, **call)[0]


def apply_and_update(
    model: Model, variables: Any, *inputs: Any, **call: Any
) -> tuple[Any, Any]:
    """What the model returns, and its variables but for Linen's parameters as it leaves them.

    What hooks sow, in Linen into the collection SOWN, is among them.
    """
    if isinstance(model, Linen):
        mutable = [name for name in (*variables, SOWN) if name != "params"]
        return model.apply(variables, *inputs, mutable=mutable, **call)
    module = nnx.merge(model, variables, copy=True)
    return module(*inputs, **call), nnx.state(module)


@dataclasses.dataclass(frozen=True, eq=False)
class Intercepted:
    """A Linen model within interceptors.

    Attributes:
      model: as it was.
      hooks: each with the classes of its layers, the outermost first.
      number: of this and no other.
    """

    model: nn.Module
    hooks: tuple[tuple[Hook, tuple[type, ...]], ...]
    number: int = dataclasses.field(default_factory=itertools.count().__next__)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        with self._intercepting():
            return self.model.apply(variables, *args, **kwargs)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        with self._intercepting():
            return self.model.init(rngs, *args, **kwargs)

    @contextlib.contextmanager
    def _intercepting(self):
        with nn.intercept_methods(self._through), _known_to_jit(self.number):
            yield

    def _through(self, function, args, kwargs, context):
        layer = context.module
        if context.method_name == "__call__":
            hooks = [(layer.path, h) for h, kinds in self.hooks if isinstance(layer, kinds)]
            function = _hooked_function(layer, hooks, function)
        return function(*args, **kwargs)


@contextlib.contextmanager
def _known_to_jit(number):
    """Within it the key of what `nn.jit` caches has the path of the module and the number.

    By itself it has the fields of the module, which are the same of two modules and with
    any hooks, and it is compared by its hash alone. Flax has no public way to add to it. (A
    context that is part of the key of all of JAX's caches, `jax.make_user_context`, has
    every single operation compiled anew.)
    """
    plain = transforms._HashableProxy.from_module

    def with_more(module):
        proxy = plain(module)
        key = hash((proxy.hash_key, module.path, number))
        return dataclasses.replace(proxy, hash_key=key)

    with mock.patch.object(transforms._HashableProxy, "from_module", with_more):
        yield


Linen = nn.Module | Intercepted
Model = Linen | nnx.GraphDef


def _intercept_nnx(layer, path, hook):
    if hasattr(layer, "hooks"):
        layer.hooks = (*layer.hooks, (path, hook))
    else:
        object.__setattr__(layer, "__class__", _hooked(type(layer)))
        layer.hooks = ((path, hook),)


@functools.cache
def _hooked(cls):
    """A subclass, for the hooks that an instance has."""

    @functools.wraps(cls.__call__)
    def call(self, *args, **kwargs):
        function = functools.partial(cls.__call__, self)
        return _hooked_function(self, self.hooks, function)(*args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call})


def _hooked_function(layer, hooks, function):
    for path, hook in reversed(hooks):
        function = functools.partial(_through, layer, path, hook, function)
    return function


def _through(layer, path, hook, function, *args, **kwargs):
    return hook(Call(path, layer, args, kwargs, function))
