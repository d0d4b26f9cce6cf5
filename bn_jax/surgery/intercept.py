"""A model whose layers are called through a function, without touching its source.

What every operation that runs a model rests on: Linen's interceptors and, for NNX, a
subclass in place of the layer's class, which leaves the structure of the variables alone.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx
from flax.errors import ModifyScopeVariableError

from bn_jax.surgery.calls import (
    KNOWN,
    Adapter,
    BatchNorms,
    Hook,
    Hooking,
    Path,
    Stranger,
    callable_by,
    refuse,
)
from bn_jax.surgery.compare import arrays_among
from bn_jax.surgery.intercepted import Intercepted

SOWN = "bn_jax.surgery"
Linen = nn.Module | Intercepted
Model = Linen | nnx.GraphDef
# Collections of Linen; or of NNX.
Variables = Mapping[str, Any] | nnx.State


def known(batch_norms: BatchNorms | None = None) -> BatchNorms:
    """Ours and Flax's classes of BatchNorms, and what the caller has named beside them."""
    return {**KNOWN, **(batch_norms or {})}


def check_model(model: Any) -> None:
    """Raises a TypeError, of one line, unless it is a Linen module or an NNX GraphDef."""
    if isinstance(model, nnx.Module):
        raise TypeError(
            f"{type(model).__name__} is an nnx.Module: pass graphdef and state, of "
            "graphdef, state = nnx.split(module)"
        )
    if not isinstance(model, Model):
        raise TypeError(f"{type(model).__name__} is no Linen module and no nnx.GraphDef")


def intercept(
    model: Model,
    variables: Variables,
    hook: Hook,
    norms: BatchNorms = KNOWN,
    others: tuple[type, ...] = (),
    stranger: Stranger = refuse,
    outermost: bool = False,
) -> Model:
    """A model with the same variables, whose layers return what `hook` returns.

    Of a model that is intercepted already the new hook is the inner one: it is given what
    the model makes of its layers, a frozen one called with its running statistics, one that
    is folded away not at all. (What `swap` puts in place of a layer is within all hooks.)

    Args:
      model, variables: see `bn_jax.surgery`.
      hook: is given each `Call`; `call.proceed()` is what the layer returns by itself. For
        the model to pickle it must.
      norms: classes of BatchNorms; see `known`.
      others: further classes of layers.
      stranger: is called with the path and class of a layer that has running statistics but
        is of no class in `norms`; by default that is refused. In Linen when it is called, in
        NNX at once.
      outermost: give the hook the calls as the model makes them, those of layers that are
        frozen or folded away too.

    Raises:
      TypeError: a model that is neither Linen's nor a GraphDef.
    """
    check_model(model)
    return hook_in(model, variables, Hooking(hook, norms, others, stranger), outermost)


def hook_in(
    model: Model, variables: Variables, hooking: Hooking, outermost: bool = False
) -> Model:
    """`intercept` with a Hooking that is there already."""
    if isinstance(model, Intercepted):
        return Intercepted(model.model, _with(model.hooks, hooking, outermost))
    if isinstance(model, nn.Module):
        return Intercepted(model, (hooking,))
    module = nnx.merge(model, variables, copy=True)
    for path, layer in nnx.iter_modules(module):
        _intercept_nnx(layer, path, hooking, outermost)
    return nnx.graphdef(module)


def _with(hooks, new, outermost):
    """The hooks with a new one; those that replace layers are within the others."""
    at = 0 if outermost else sum(not h.replaces for h in hooks)
    return (*hooks[:at], new, *hooks[at:])


def swapped(model: Model, variables: Variables, paths: Iterable[Path]) -> dict[Path, str]:
    """The names of what `swap` has put in place of these layers, by their paths."""
    layers = {}
    if isinstance(model, nnx.GraphDef):
        layers = dict(nnx.iter_modules(nnx.merge(model, variables, copy=True)))
    every = model.hooks if isinstance(model, Intercepted) else ()
    found = {}
    for path in paths:
        own = (met.hooking for met in getattr(layers.get(path), "surgery_hooks", ()))
        names = [name for hooking in (*every, *own) if (name := hooking.swapped(path))]
        found |= {path: names[0]} if names else {}
    return found


def apply(model: Model, variables: Variables, *inputs: Any, **call: Any) -> Any:
    """What the model returns; nothing that it does to its variables is kept."""
    return apply_and_update(model, variables, *inputs, **call)[0]


def apply_and_update(
    model: Model, variables: Variables, *inputs: Any, **call: Any
) -> tuple[Any, Variables]:
    """What the model returns, and its variables but for Linen's parameters as it leaves them.

    What hooks sow, in Linen into the collection SOWN, is among them.
    """
    if isinstance(model, Linen):
        mutable = [name for name in (*variables, SOWN) if name != "params"]
        return model.apply(variables, *inputs, mutable=mutable, **call)
    module = nnx.merge(model, variables, copy=True)
    return module(*inputs, **call), nnx.state(module)


Run = Callable[..., tuple[Any, Variables]]


def evaluation(model: Model, variables: Variables, *inputs: Any, **call: Any) -> Run:
    """`apply_and_update` as one calls a model at inference, without mutable statistics.

    There are Linen models that train wherever `batch_stats` are mutable. One that writes them
    in this call nevertheless is in training, and gets them mutable.
    """
    check_model(model)
    if not isinstance(model, Linen):
        return apply_and_update
    arrays, replaced = arrays_among(inputs)

    def attempt(variables, arrays):
        return _with_fixed_statistics(model, variables, *replaced(arrays), **call)[1]

    try:
        jax.eval_shape(attempt, variables, arrays)
    except ModifyScopeVariableError:
        return apply_and_update
    return _with_fixed_statistics


def _with_fixed_statistics(model, variables, *inputs, **call):
    fixed = ("params", "batch_stats")
    mutable = [name for name in (*variables, SOWN) if name not in fixed]
    return model.apply(variables, *inputs, mutable=mutable, **call)


class _Met(NamedTuple):
    """A hook at a layer of NNX: what `Hooking.around` is given."""

    path: Path
    kind: type
    adapter: Adapter | None
    hooking: Hooking

    @property
    def replaces(self) -> bool:
        """See `Hooking`."""
        return self.hooking.replaces


def _intercept_nnx(layer, path, hooking, outermost):
    hooking.check(path, layer, called=False)
    cls = next(base for base in type(layer).__mro__ if "surgery_kind" not in vars(base))
    kind = hooking.kind(cls)
    if kind is None or not callable_by(cls):
        return
    object.__setattr__(layer, "__class__", _hooked(type(layer), cls, kind[0]))
    before, new = getattr(layer, "surgery_hooks", ()), _Met(path, kind[0], kind[1], hooking)
    layer.surgery_hooks = _with(before, new, outermost)


@functools.cache
def _hooked(cls, own, kind):
    """The class, of which `own` is the one that somebody wrote, with hooks around `kind`'s.

    A class between them has its `super().__call__` go through the hooks.
    """
    around = _around(kind)
    if issubclass(cls, around):
        return cls
    if own is kind:
        if cls is own:
            return around
        return _made(_hooked, (cls, own, kind), own, (around, cls), {})

    @functools.wraps(own.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = super(hooked, self).__call__(*args, **kwargs)
        for met in self.surgery_hooks:
            met.hooking.check(met.path, self, called=True)
        return y

    hooked = _made(_hooked, (cls, own, kind), own, (cls, around), {"__call__": call})
    return hooked


@functools.cache
def _around(kind):
    """A subclass with hooks around the `__call__` of a class."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = super(around, self).__call__
        for met in reversed(self.surgery_hooks):
            if met.kind is kind:
                function = met.hooking.around(met.path, self, kind, met.adapter, function)
        return function(*args, **kwargs)

    around = _made(_around, (kind,), kind, (kind,), {"__call__": call})
    return around


def _made(function, args, own, bases, namespace):
    """A class that pickles as the call of a function, whose result it is."""
    namespace = {**namespace, "surgery_kind": (function, args)}
    return _pickling(type(own))(own.__name__, bases, namespace)


@functools.cache
def _pickling(meta):
    meta = type(meta.__name__, (meta,), {})
    copyreg.pickle(meta, lambda cls: vars(cls)["surgery_kind"])
    return meta
