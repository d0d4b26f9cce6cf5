"""The BatchNorm layers of a model, found by running it, and what each sees.

Layers are named by their path: of module names in Linen, of attributes and indices in NNX,
which is where their variables are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fnmatch
import functools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.core.moments import Moments, merge, moments
from bn_jax.surgery.calls import (
    KNOWN,
    BatchNorms,
    Call,
    Path,
    Stranger,
    attributes,
    refuse,
    spelled,
)
from bn_jax.surgery.intercept import SOWN, Linen, Model, apply, apply_and_update, intercept
from bn_jax.surgery.sown import coming_out, sow, sown
from bn_jax.surgery.tree import layer_leaves, layer_places

Pattern = str | Sequence[str]
T = TypeVar("T")


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model's positional arguments. Bools and strings, a mode for one, are no data."""

    args: tuple[Any, ...]

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """A tuple is the arguments, and anything else the first of them."""
        return cls(batch if isinstance(batch, tuple) else (batch,))

    def tree_flatten(self):
        leaves, structure = jax.tree.flatten(self.args)
        static = [None if _is_data(v) else (v,) for v in leaves]
        return [v for v in leaves if _is_data(v)], (structure, tuple(static))

    @classmethod
    def tree_unflatten(cls, aux, data):
        (structure, static), data = aux, iter(data)
        leaves = [next(data) if v is None else v[0] for v in static]
        return cls(jax.tree.unflatten(structure, leaves))


def _is_data(v):
    return not isinstance(v, bool | str | enum.Enum)


class Used(NamedTuple):
    """The BatchNorms that a call of a model uses, and the axes that it names.

    Attributes:
      calls: of each layer, in the order of first calls. They are of use for their layer and
        mode, not for the input.
      axes: names that nobody has bound where the model runs; see `on_one_device`.
    """

    calls: dict[Path, list[Call]]
    axes: tuple[str, ...]


def used(
    model: Model,
    variables: Any,
    *inputs: Any,
    norms: BatchNorms = KNOWN,
    stranger: Stranger = refuse,
    **call: Any,
) -> Used:
    """The BatchNorms that a call uses. It is traced, and not run.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with; of the inputs only shapes matter.
      norms, stranger: see `intercept`.

    Raises:
      NameError: an unbound axis that no module has for its `axis_name`.
    """
    named: dict[str, None] = {}
    calls: dict[Path, list[Call]] = {}
    there = layer_places(model, variables, nnx.BatchStat)

    def hook(one):
        named.update(dict.fromkeys(_unbound(one.layer)))
        if one.adapter is None:
            return one.proceed()
        if one.path in there:
            calls.setdefault(one.path, []).append(one)
        with on_one_device(one.layer, named), allowing_single(one.layer):
            return one.proceed()

    every = (nn.Module, nnx.Module)
    seen = intercept(model, variables, hook, norms, every, stranger, outermost=True)
    while True:
        axes = tuple(named)
        calls.clear()
        run = binding(axes, lambda v, x: apply(seen, v, *x.args, **call))
        try:
            with coming_out():
                jax.eval_shape(run, variables, Inputs(inputs))
        except NameError:
            # A collective somewhere else, over an axis that a module has named by now.
            if axes == tuple(named):
                raise
        else:
            return Used(calls, tuple(named))


def binding(axes: Iterable[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with these axes bound, of one device each."""
    for name in axes:
        # Nothing has the axis, so that no value becomes another one.
        function = jax.vmap(function, None, None, axis_name=name, axis_size=1)
    return function


def on_one_device(layer: Any, axes: Collection[str]) -> contextlib.AbstractContextManager:
    """Within it a layer that names one of these axes has no replicas."""
    if not set(axes) & set(_axes(layer)):
        return contextlib.nullcontext()
    names = {"axis_name": None, "axis_index_groups": None}
    return attributes(layer, **{n: v for n, v in names.items() if hasattr(layer, n)})


def allowing_single(layer: Any) -> contextlib.AbstractContextManager:
    """Within it a layer is not refused for a single element, as nothing is computed."""
    if hasattr(layer, "allow_single"):
        return attributes(layer, allow_single=True)
    return contextlib.nullcontext()


def _axes(layer):
    name = getattr(layer, "axis_name", None)
    return tuple(name) if isinstance(name, tuple | list) else (name,) if name else ()


def _unbound(layer):
    for name in _axes(layer):
        try:
            jax.lax.axis_size(name)
        except NameError:
            yield name


def fitting(paths: Iterable[Path], pattern: Pattern) -> set[Path]:
    """The paths that a glob fits, or one of several.

    Raises:
      ValueError: a glob fits none.
    """
    paths, found = list(paths), set()
    for glob in [pattern] if isinstance(pattern, str) else pattern:
        fits = {p for p in paths if fnmatch.fnmatchcase(spelled(p), glob)}
        if not fits:
            names = ", ".join(map(spelled, paths)) or "none"
            raise ValueError(f"no BatchNorm fits {glob!r}: there are {names}")
        found |= fits
    return found


def numbered(model: Model, call: dict[str, Any], number: Any) -> dict[str, Any]:
    """The call with keys of its own for batch `number`: `fold_in` of Linen's `rngs`."""
    if not isinstance(model, Linen) or call.get("rngs") is None:
        return call
    fold = functools.partial(_fold_in, number)
    return {**call, "rngs": jax.tree.map(fold, call["rngs"])}


def _fold_in(number, key):
    return jax.random.fold_in(key, number)


def batch_moments(
    model: Model,
    variables: Any,
    *inputs: Any,
    inference: Collection[Path] = (),
    norms: BatchNorms = KNOWN,
    axes: Collection[str] = (),
    **call: Any,
) -> tuple[dict[Path, Moments], Any]:
    """The Moments of what every BatchNorm sees in one batch, and the variables after it.

    Those of a layer that is called several times are merged.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with.
      inference: paths of layers that use their running statistics, whatever the call says.
      norms: classes of BatchNorms.
      axes: names to bind, for one device.

    Raises:
      ValueError: a layer within `nn.scan`, or the like, that Moments do not come out of.
    """
    ranks: dict[Path, int] = {}
    stats = layer_leaves(model, variables, nnx.BatchStat)

    def hook(one):
        if one.path not in stats:
            return one.proceed()
        ranks[one.path] = stats[one.path][one.adapter.mean].ndim
        with on_one_device(one.layer, axes):
            sow_moments(one.layer, input_moments(one))
            return one.proceed(True if one.path in inference else None)

    seen = intercept(model, variables, hook, norms, outermost=True)
    run = binding(axes, lambda v, x: apply_and_update(seen, v, *x.args, **call)[1])
    with coming_out():
        after = run(variables, Inputs(inputs))
    found = {path: _joined(sown_moments(after, path), rank) for path, rank in ranks.items()}
    return found, after


def sow_moments(layer: Any, new: Moments) -> None:
    """Leaves Moments at a layer, beside those of its calls before."""
    sow(layer, "moments", (new,), operator.add)


def sown_moments(variables: Any, path: Path) -> tuple[Moments, ...]:
    """What was left at a layer, in the order of its calls.

    Raises:
      ValueError: nothing came out of a transformation that the layer is within.
    """
    found = sown(variables, "moments")
    if path not in found:
        raise ValueError(
            f"{spelled(path)} is within a scan or vmap, which its Moments do not come out of: "
            f"tell that of the collection, variable_axes={{{SOWN!r}: 0}}"
        )
    return found[path]


def merged(parts: T, merge: Callable[[T, T], T] = merge) -> T:
    """Moments along a first axis as one; or others, by another function than `merge`."""
    first, others = (jax.tree.map(lambda v, s=s: v[s], parts) for s in (0, slice(1, None)))
    return jax.lax.scan(lambda a, b: (merge(a, b), None), first, others)[0]


def _joined(calls, rank):
    """One layer's; of a scan with statistics of every step, each step's."""
    each = []
    for m in map(per_step, calls):
        while m.mean.ndim > rank:
            m = merged(m)
        each.append(m)
    return functools.reduce(merge, each)


def per_step(m: Moments) -> Moments:
    """Of a layer within a scan that has statistics of every step: a count beside each mean."""
    if not 0 < m.count.ndim < m.mean.ndim:
        return m
    rest = (1,) * (m.mean.ndim - m.count.ndim)
    count, weight = (
        jnp.broadcast_to(v.reshape(*v.shape, *rest), m.mean.shape) for v in (m.count, m.weight)
    )
    return m._replace(count=count, weight=weight)


def input_moments(call: Call) -> Moments:
    """The Moments of the input of one call of a BatchNorm, over its replicas too."""
    names = ("axis_name", "axis_index_groups")
    replicas: dict[str, Any] = {name: getattr(call.layer, name, None) for name in names}
    return moments(call.x, axis=call.axis, mask=call.kwargs.get("mask"), **replicas)
