"""What every formula here asks of its arguments: axes, dtypes, weights, vectors per feature."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Axes = int | Sequence[int]


def split_axes(shape: tuple[int, ...], axis: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The feature axes and the axes to reduce, both non-negative and ascending."""
    rank = len(shape)
    axes = tuple(map(operator.index, axis if isinstance(axis, Iterable) else (axis,)))
    if any(not -rank <= a < rank for a in axes):
        raise ValueError(f"axis={axis} does not exist in an input of shape {shape}")
    kept = tuple(sorted({a % rank for a in axes}))
    if len(kept) != len(axes):
        raise ValueError(f"axis={axis} names an axis of shape {shape} twice")
    return kept, tuple(a for a in range(rank) if a not in kept)


def examples_axis(x: jax.Array, axis: Axes) -> int:
    """The axis along which the examples lie: the first that is not a feature axis."""
    reduced = split_axes(x.shape, axis)[1]
    if not reduced:
        raise ValueError(f"axis={axis} leaves no axis of examples in a shape of {x.shape}")
    return reduced[0]


def feature_shape(shape: tuple[int, ...], axis: Axes) -> tuple[int, ...]:
    """`[features]`: the sizes of the feature axes, in their order."""
    return tuple(shape[a] for a in split_axes(shape, axis)[0])


def check_features(x: jax.Array, axis: Axes, **vectors: jax.Array | None) -> None:
    """Raises a ValueError that names the first vector that is not of shape `[features]`."""
    features = feature_shape(x.shape, axis)
    for name, v in vectors.items():
        if v is not None and jnp.shape(v) != features:
            raise ValueError(
                f"{name} of shape {jnp.shape(v)} for {features} features: an input of shape "
                f"{x.shape} with feature axis {axis}"
            )


def widen(x: jax.Array, axis: Axes, **vectors: jax.Array | None) -> list[jax.Array | None]:
    """Each vector in x's rank, so that it broadcasts against x.

    A vector is of shape `[features]`; or of x's rank, with x's sizes on the feature axes
    and x's or 1 on the others: one value per example, say.

    Raises:
      ValueError: it is neither.
    """
    kept, reduced = split_axes(x.shape, axis)
    wide = []
    for name, v in vectors.items():
        if v is not None and jnp.ndim(v) == x.ndim:
            allowed = [(s,) if a in kept else (1, s) for a, s in enumerate(x.shape)]
            if all(s in sizes for s, sizes in zip(jnp.shape(v), allowed, strict=True)):
                wide.append(jnp.asarray(v))
                continue
        check_features(x, axis, **{name: v})
        wide.append(None if v is None else jnp.expand_dims(v, reduced))
    return wide


def accumulation_dtype(x: jax.Array) -> jnp.dtype:
    """float32 for half precision and float32, float64 for float64; complex for complex."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"batch normalisation of {x.dtype} input: cast it to a floating-point dtype"
        )
    return jnp.promote_types(x.dtype, jnp.float32)


def real_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of x's variance: float32 or float64."""
    return jnp.finfo(accumulation_dtype(x)).dtype


def is_stored_wide(dtype: jnp.dtype) -> bool:
    """Whether XLA is to be kept from float32 copies: of bfloat16, on CPU.

    What several sums take of one name in float32 it stores there, and reads back for each of
    them: half the time of a layer, and two thirds of its memory. (Of float16, and of what
    is masked, it does so whatever the names.)
    """
    return dtype == jnp.bfloat16 and jax.default_backend() == "cpu"


def apart(v: jax.Array, *beside: jax.Array) -> jax.Array:
    """v, if `is_stored_wide` under a name of its own; another with another v or `beside`."""
    return lax.optimization_barrier((v, *beside))[0] if is_stored_wide(v.dtype) else v


def abs2(v: jax.Array) -> jax.Array:
    """|v|^2, real."""
    return jnp.real(v * jnp.conj(v)) if jnp.iscomplexobj(v) else v**2


def weights(x: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """The mask as weights in the dtype of x's variance, a constant to differentiation."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    fits = mask.ndim == x.ndim and all(
        m in (1, s) for m, s in zip(mask.shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"a mask of shape {mask.shape} for an input of shape {x.shape}: it must have "
            "the input's rank, with sizes equal to the input's or 1"
        )
    return lax.stop_gradient(mask.astype(real_dtype(x)))


def weigh(v: jax.Array, w: jax.Array | None) -> jax.Array:
    """w v, and 0 where w is 0 whatever v is there (padding may hold NaN)."""
    return v if w is None else jnp.where(w > 0, w * v, 0)


def check_some(x: jax.Array) -> None:
    """Raises a ValueError where x has no elements."""
    if x.size == 0:
        raise ValueError(f"no elements to normalise over in an input of shape {x.shape}")


def element_count(x: jax.Array, reduced: tuple[int, ...], w: jax.Array | None) -> jax.Array:
    """Sum of the weights per feature; `[]` unless the mask differs between features."""
    check_some(x)
    if w is None:
        count = math.prod(x.shape[a] for a in reduced)
        return jnp.asarray(count, real_dtype(x))
    # Each element of a broadcast mask stands for this many of x.
    repeats = math.prod(x.shape[a] for a in reduced if w.shape[a] == 1)
    count = repeats * jnp.sum(w, axis=reduced)
    kept = tuple(s for a, s in enumerate(x.shape) if a not in reduced)
    return count.reshape(()) if count.size == 1 else jnp.broadcast_to(count, kept)


def varying(tree) -> frozenset:
    """The axes of `shard_map(check_vma=True)` over which any array of the tree varies."""
    axes = (jax.typeof(v).manual_axis_type.varying for v in jax.tree.leaves(tree))
    return frozenset().union(*axes)


def vary(tree, names: frozenset):
    """The tree, varying over these axes as well."""

    def one(v):
        missing = tuple(names - varying(v))
        return lax.pcast(v, missing, to="varying") if missing else v

    return jax.tree.map(one, tree)
