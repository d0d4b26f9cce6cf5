"""Another norm where a BatchNorm is, from outside, on the BatchNorm's own variables."""

from __future__ import annotations

import contextvars
import dataclasses
import fnmatch
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
from flax import nnx

from bn_jax.surgery.calls import (
    BatchNorms,
    Call,
    Hooking,
    Path,
    refuse,
    spelled,
)
from bn_jax.surgery.freeze import norm_paths
from bn_jax.surgery.intercept import Linen, hook_in, known
from bn_jax.surgery.norms import NORMS, of_function
from bn_jax.surgery.observe import Pattern, fitting
from bn_jax.surgery.replacements import INNER, AsItWas, Computed, Layer

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
    """Returns the model with another norm in place of its BatchNorms.

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
    hook = _hook(norm, options, nnx.Module if isinstance(model, nnx.Module) else nn.Module)
    name = norm if isinstance(norm, str) else "a norm without a name"
    globs = (only,) if isinstance(only, str) else tuple(only)
    hooking = _Swapping(hook, known(batch_norms), (), refuse, name=name, only=globs)
    if not isinstance(model, nnx.Module):
        return hook_in(model, {}, hooking)
    module = nnx.clone(model)
    calls = {}
    for path, layer in nnx.iter_modules(module):
        hooking.check(path, layer, called=False)
        if INNER not in path and (kind := hooking.kind(type(layer))):
            calls[path] = Call(path, layer, (), {}, layer, *kind)
    for path in fitting(calls, globs):
        hook.prepare(calls[path])
    graphdef, state = nnx.split(module)
    graphdef: Any = hook_in(graphdef, state, hooking)
    return nnx.merge(graphdef, state)


def _hook(norm: Any, options: dict[str, Any], base: type) -> AsItWas:
    """The hook of a norm, for a model whose class is derived from `base`."""
    if isinstance(norm, str):
        if norm not in NORMS and norm != "flax":
            raise ValueError(f"norm={norm!r} is none of {', '.join(NORMS)} and flax")
        has = list(inspect.signature(NORMS.get(norm, AsItWas)).parameters)[1:]
        if unknown := [option for option in options if option not in has]:
            raise ValueError(f"{norm} has options {has}, not {unknown[0]}")
        if norm == "flax":
            return AsItWas()
        start = {"dyt": {"alpha": options.get("alpha", 0.5)}, "renorm": {"count": 0}}
        function = functools.partial(NORMS[norm], **options)
        return Computed(norm, function, start.get(norm, {}))
    if options:
        raise ValueError(f"{', '.join(options)}: options are of norms with a name; use partial")
    made = norm
    while isinstance(made, functools.partial):
        made = made.func
    if isinstance(made, type) and issubclass(made, base):
        return Layer(norm)
    if isinstance(made, type | nn.Module | nnx.Module) or not callable(made):
        name = made.__name__ if isinstance(made, type) else f"a {type(made).__name__}"
        api = "flax.linen" if base is nn.Module else "flax.nnx"
        raise TypeError(f"norm is {name}: say a name, a function or a class of {api}")
    return Computed("", functools.partial(of_function, norm), {})


@dataclasses.dataclass(frozen=True, eq=False)
class _Swapping(Hooking):
    """A hook in place of the BatchNorms of a pattern.

    Attributes:
      name: of the norm.
      only: globs over their paths.
    """

    replaces: ClassVar[bool] = True
    name: str = ""
    only: tuple[str, ...] = ("*",)

    def given(self, call: Call) -> Any:
        """What the norm returns, within which the BatchNorm is itself."""
        if not self.swapped(call.path) or call.use_running_average is None:
            return call.proceed()  # or its refusal
        token = _within.set((*_within.get(), call.path))
        try:
            return self.hook(call)
        finally:
            _within.reset(token)

    def swapped(self, path: Path) -> str:
        """The norm's name, of a BatchNorm that it replaces."""
        there = INNER not in path and path not in _within.get()
        return self.name if there and self._fits(path) else ""

    def check(self, path: Path, layer: Any, called: bool) -> None:
        """Raises a ValueError, when a Linen model has run, if no BatchNorm fits."""
        if self._fits(path):
            super().check(path, layer, called)
        if path == () and called and isinstance(layer, nn.Module):
            fitting(sorted(self.met | set(norm_paths(layer.variables)), key=str), self.only)

    def _fits(self, path):
        return any(fnmatch.fnmatchcase(spelled(path), glob) for glob in self.only)
