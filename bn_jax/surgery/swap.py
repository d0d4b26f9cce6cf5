"""Another norm where a BatchNorm is, from outside, on the BatchNorm's own variables."""

from __future__ import annotations

import contextvars
import dataclasses
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.core.layer import check_call
from bn_jax.core.running import BatchStats
from bn_jax.surgery.calls import (
    SWAPPED_BATCH_NORMS,
    Adapter,
    BatchNorms,
    Call,
    Hooking,
    Path,
    attributes,
    refuse,
    spelled,
)
from bn_jax.surgery.diagnose.modes import MODES
from bn_jax.surgery.freeze import norm_paths
from bn_jax.surgery.intercept import Linen, hook_in, known
from bn_jax.surgery.norms import Norm, Site
from bn_jax.surgery.observe import Pattern, fitting
from bn_jax.surgery.tree import COLLECTIONS, value

INNER = "surgery_layer"  # the attribute of an NNX layer with the one in its place
# The layers that are swapped right now: what is called within is what it is.
_within: contextvars.ContextVar[tuple[Path, ...]] = contextvars.ContextVar("within", default=())


def swap(
    model: Linen | nnx.Module,
    norm: str | Callable[..., Any],
    only: Pattern = "*",
    *,
    batch_norms: BatchNorms | None = None,
    **options: Any,
) -> Any:
    """The model, with another norm in place of its BatchNorms.

        swapped = swap(model, "group", num_groups=8)         # Linen: init and apply as before
        graphdef, state = nnx.split(swap(module, "layer"))   # NNX: a changed copy

    The norm takes the scale and bias of the BatchNorm, and its axis, epsilon, dtype and
    activation. The tree of variables stays as it was, so that checkpoints load: what a norm
    has no use for is there, and untouched. `renorm` adds a count of updates to
    `batch_stats` and `dyt` alpha, a number, to `params`: in Linen `init` of the swapped model
    makes them, in NNX they are in the copy.

    To other operations `bn`, `flax`, `ghost` and `renorm` are BatchNorms, which `freeze` for
    one keeps; the others are none. Of several swaps of a layer the last one counts.

    Args:
      model: a Linen module, before or after `init`; or an `nnx.Module`.
      norm: a name of `bn_jax.surgery.norms`, or `flax`: the layer as it was; or a function
        (x, scale, bias, *, train) -> y of x's shape, for which scale and bias are of x's rank,
        1 and 0 where there is none; or a layer class of the model's API (or a
        `functools.partial` of one; in NNX it is called with the number of features and
        `rngs`), which has settings of its own. Of its variables those that the BatchNorm has
        too are the BatchNorm's. It is told the mode, if its call takes one of `train`,
        `training`, `is_training`, `deterministic` and `use_running_average`, and the mask.
      only: the BatchNorms, by globs over paths as in `freeze`.
      batch_norms: further classes of BatchNorms; see `Adapter`.
      **options: `num_groups` of group; `group_size` (32) and `strided` of ghost; `r_max` and
        `d_max` of renorm, the paper's schedules; `alpha` of dyt, at the start (0.5).

    Raises:
      TypeError: a model of another kind; a layer that is no class, or of the other API.
      ValueError: an unknown norm or option; no BatchNorm fits `only`, or one of an unknown
        class does (in Linen when the model is called).
    """
    if not isinstance(model, Linen | nnx.Module):
        raise TypeError(
            f"{type(model).__name__} is no Linen module and no nnx.Module: of a GraphDef swap "
            "nnx.merge(graphdef, state)"
        )
    base = nnx.Module if isinstance(model, nnx.Module) else nn.Module
    made = Norm.named(norm, options) if isinstance(norm, str) else Norm.of(norm, base)
    if options and not isinstance(norm, str):
        raise ValueError(f"{', '.join(options)}: {made.name} takes no options, use partial")
    globs = (only,) if isinstance(only, str) else tuple(only)
    hooking = _Swapping(_Swap(made, globs), known(batch_norms), (), refuse)
    if not isinstance(model, nnx.Module):
        return hook_in(model, {}, hooking)
    module = nnx.clone(model)
    kinds = {path: (v, hooking.kind(type(v))) for path, v in nnx.iter_modules(module)}
    layers = {
        path: (v, kind[1]) for path, (v, kind) in kinds.items() if kind and INNER not in path
    }
    for path in fitting(layers, globs):
        _prepare(made, path, *layers[path])
    graphdef, state = nnx.split(module)
    graphdef: Any = hook_in(graphdef, state, hooking)
    return nnx.merge(graphdef, state)


def _fits(globs: tuple[str, ...], path: Path) -> bool:
    return any(fnmatch.fnmatchcase(spelled(path), glob) for glob in globs)


@dataclasses.dataclass(frozen=True)
class _Swap:
    """What is made of the calls of BatchNorms: a hook.

    Attributes:
      norm: in the place of these.
      only: globs over their paths.
    """

    norm: Norm
    only: tuple[str, ...]

    def swaps(self, path: Path) -> bool:
        """Whether the BatchNorm is swapped, which within its own call it is not."""
        return _fits(self.only, path) and INNER not in path and path not in _within.get()

    def __call__(self, call: Call) -> Any:
        """What the norm returns."""
        if not self.swaps(call.path):
            return call.proceed()
        token = _within.set((*_within.get(), call.path))
        try:
            return self._swapped(call)
        finally:
            _within.reset(token)

    def _swapped(self, call):
        making = isinstance(call.layer, nn.Module) and call.layer.is_initializing()
        if self.norm.name == "flax" or call.use_running_average is None:
            return call.proceed()  # or its refusal
        if making:
            call.proceed()
            _make(self.norm, call.layer)
        if self.norm.layer is not None:
            return _called(_inner(self.norm.layer, call), call)
        given = {n: call.kwargs[n] for n in ("scale", "bias") if n in call.kwargs}
        if given:
            check_call(call.layer, **given)
        site = Site(call, _leaves(call) | given, making)
        self._check(site)
        y, stats = self.norm.function(site)
        moves = not (making or call.use_running_average)
        if stats is not None and moves and call.kwargs.get("update_stats", True):
            _write(call, stats)
        return y

    def _check(self, site):
        """Refuses a layer some of whose variables are missing."""
        wanted = [name for name, _, _ in self.norm.new]
        wanted += ["mean", "var"] if self.norm.name in SWAPPED_BATCH_NORMS else []
        wanted += [n for n in ("scale", "bias") if getattr(site.call.layer, f"use_{n}", False)]
        if missing := [name for name in wanted if name not in site.leaves]:
            raise ValueError(
                f"{spelled(site.call.path)} has no {' and no '.join(missing)} for "
                f"{self.norm.name}: take it from what init of the swapped model returns"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Swapping(Hooking):
    """The hook, and a check that it was given something to do."""

    hook: _Swap
    replaces: ClassVar[bool] = True

    def swapped(self, path: Path) -> str:
        """The norm's name."""
        return self.hook.norm.name if self.hook.swaps(path) else ""

    def check(self, path: Path, layer: Any, called: bool) -> None:
        """Raises a ValueError, when a Linen model has run, if no BatchNorm fits."""
        if _fits(self.hook.only, path):
            super().check(path, layer, called)
        # While variables are made, not after a helper that the model calls first.
        if (
            path == ()
            and isinstance(layer, nn.Module)
            and (called or not layer.is_initializing())
        ):
            there = self.met | set(norm_paths(layer.variables))
            fitting(sorted(there, key=str), self.hook.only)


def _leaves(call: Call) -> dict[str, jax.Array]:
    """The layer's variables, by our names."""
    layer = call.layer
    if isinstance(layer, nnx.Module):
        stored = {n: v for n, v in vars(layer).items() if isinstance(v, nnx.Variable)}
    else:
        stored = {n: v for c in COLLECTIONS for n, v in layer.variables.get(c, {}).items()}
    return call.adapted.ours({n: value(v) for n, v in stored.items()})


def _write(call: Call, stats: BatchStats) -> None:
    """Keeps running statistics, those that the layer has."""
    for name, v in call.adapted.theirs(stats._asdict()).items():
        if isinstance(call.layer, nnx.Module):
            if isinstance(old := getattr(call.layer, name, None), nnx.Variable):
                old.set_value(v)
        elif call.layer.has_variable("batch_stats", name):
            call.layer.put_variable("batch_stats", name, v)


def _make(norm: Norm, layer: nn.Module) -> None:
    """Makes the norm's own variables in a Linen layer."""
    for name, kind, start in norm.new:
        collection = "params" if kind is nnx.Param else "batch_stats"
        if not layer.has_variable(collection, name):
            layer.put_variable(collection, name, _start(layer, kind, start, ()))


def _start(layer, kind, start, shape):
    dtype = getattr(layer, "param_dtype", jnp.float32) if kind is nnx.Param else jnp.int32
    return jnp.full(shape, start, dtype)


def _prepare(norm: Norm, path: Path, layer: Any, adapter: Adapter | None) -> None:
    """Makes the norm's own variables, or its layer, in an NNX layer."""
    mean, axis = getattr(layer, adapter.mean), adapter.read(layer, "axis")
    sizes = mean.shape[-1 if isinstance(axis, int) else -len(axis) :]
    repeats = mean.shape[: mean.ndim - len(sizes)]  # of a layer under vmap or scan
    for name, kind, start in norm.new:
        if getattr(layer, name, None) is None:
            setattr(layer, name, kind(_start(layer, kind, start, repeats)))
    if norm.layer is None:
        return
    inner = norm.layer(sizes[0] if len(sizes) == 1 else sizes, rngs=nnx.Rngs(0))
    lent = adapter.ours({n: v for n, v in vars(layer).items() if isinstance(v, nnx.Variable)})
    for name, v in lent.items():
        if isinstance(own := getattr(inner, name, None), nnx.Variable):
            if (*repeats, *own.shape) != v.shape:
                raise ValueError(
                    f"{spelled(path)} has {name} of shape {v.shape}, and "
                    f"{type(inner).__name__} of shape {own.shape}"
                )
            setattr(inner, name, None)
    graphdef, state = nnx.split(inner)
    state = jax.tree.map(lambda v: jnp.broadcast_to(v, (*repeats, *v.shape)), state)
    layer.surgery_lent = tuple(name for name in lent if hasattr(inner, name))
    setattr(layer, INNER, nnx.merge(graphdef, state))


def _inner(make: Callable[..., Any], call: Call) -> Any:
    """The layer in the place of a BatchNorm, on its variables."""
    if isinstance(call.layer, nn.Module):
        # In a scope whose names are free again: variables that are there are taken.
        return make(parent=call.layer.scope.rewound())
    return getattr(call.layer, INNER)


def _called(inner: Any, call: Call) -> Any:
    """What a layer returns, told the mode and the mask where its call takes them."""
    takes = inspect.signature(type(inner).__call__).parameters
    inference = call.use_running_average
    told = {name: training != inference for name, training in MODES.items() if name in takes}
    if "mask" in takes and call.kwargs.get("mask") is not None:
        told["mask"] = call.kwargs["mask"]
    lent = {}
    if isinstance(inner, nnx.Module):
        own = call.adapted.theirs({n: n for n in call.layer.surgery_lent})
        lent = {ours: getattr(call.layer, theirs) for theirs, ours in own.items()}
    with attributes(inner, **lent):
        y = inner(call.x, **told)
    activation = getattr(call.layer, "activation", None)
    return y if activation is None else activation(y)
