"""A model whose layers are called through a function, without touching its source.

What every operation that runs a model rests on: Linen's interceptors and, for NNX, a
subclass in place of the layer's class, which leaves the structure of the variables alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

import bn_jax.linen
import bn_jax.nnx

Path = tuple[str | int, ...]
BATCH_NORMS = (nn.BatchNorm, bn_jax.linen.BatchNorm, nnx.BatchNorm, bn_jax.nnx.BatchNorm)


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
        return (*self.args, *self.kwargs.values())[0]

    @property
    def use_running_average(self) -> bool | None:
        """Of a BatchNorm: what the call says or, where it does not, the layer."""
        said = self.args[1] if len(self.args) > 1 else self.kwargs.get("use_running_average")
        return self.layer.use_running_average if said is None else said

    def replace_x(self, x: jax.Array) -> Call:
        """The call with another input."""
        if self.args:
            return self._replace(args=(x, *self.args[1:]))
        return self._replace(kwargs={**self.kwargs, next(iter(self.kwargs)): x})

    def proceed(self, use_running_average: bool | None = None) -> Any:
        """What the layer returns, a BatchNorm in the given mode if one is given."""
        if use_running_average is None:
            return self.next(*self.args, **self.kwargs)
        kwargs = {k: v for k, v in self.kwargs.items() if k != "use_running_average"}
        # Linen takes it from the constructor or from the call, and not from both.
        with attributes(self.layer, use_running_average=use_running_average):
            return self.next(*self.args[:1], **kwargs)


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
    model: nn.Module | nnx.GraphDef,
    variables: Any,
    hook: Hook,
    kinds: tuple[type, ...] = BATCH_NORMS,
) -> nn.Module | nnx.GraphDef:
    """A model with the same variables, whose layers of `kinds` return what `hook` returns.

    Args:
      model, variables: see `bn_jax.surgery`.
      hook: is given each `Call`; `call.proceed()` is what the layer returns by itself.
      kinds: layer classes.
    """
    if isinstance(model, nn.Module):
        return Intercepted(model, hook, kinds)
    module = nnx.merge(model, variables, copy=True)
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, kinds):
            _intercept_nnx(layer, path, hook)
    return nnx.graphdef(module)


def apply(model: nn.Module | nnx.GraphDef, variables: Any, *inputs: Any, **call: Any) -> Any:
    """What the model returns; nothing that it does to its variables is kept."""
    if isinstance(model, nn.Module):
        mutable = [name for name in variables if name != "params"]
        return model.apply(variables, *inputs, mutable=mutable, **call)[0]
    return nnx.merge(model, variables, copy=True)(*inputs, **call)


class Intercepted(nn.Module):
    """A Linen model within an interceptor; its variables are the model's."""

    model: nn.Module
    hook: Hook
    kinds: tuple[type, ...]

    def setup(self):
        nn.share_scope(self, self.model)

    def __call__(self, *inputs: Any, **call: Any) -> Any:
        """What the model is called with, and returns."""

        def through(next_fun, args, kwargs, context):
            layer = context.module
            if not isinstance(layer, self.kinds) or context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            return self.hook(Call(layer.path, layer, args, kwargs, next_fun))

        with nn.intercept_methods(through):
            return self.model(*inputs, **call)


def _intercept_nnx(layer, path, hook):
    if hasattr(layer, "hooks"):
        layer.hooks = (*layer.hooks, (path, hook))
    else:
        object.__setattr__(layer, "__class__", _hooked(type(layer)))
        layer.hooks = ((path, hook),)


@functools.cache
def _hooked(cls):
    """A subclass, for the hooks that an instance has; the last of them is the outermost."""

    def call(self, *args, **kwargs):
        function = functools.partial(cls.__call__, self)
        for path, hook in self.hooks:
            function = functools.partial(_through, self, path, hook, function)
        return function(*args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call})


def _through(layer, path, hook, function, *args, **kwargs):
    return hook(Call(path, layer, args, kwargs, function))
