"""What every formula here asks of its arguments: axes, dtypes, weights, vectors per feature."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

Axes = int | Iterable[int]
F = ParamSpec("F")
R = TypeVar("R")


def promoting(f: Callable[F, R]) -> Callable[F, R]:
    """f, under JAX's standard promotion of dtypes whatever the caller's setting is.

    The formulas mix dtypes on purpose, float32 statistics with a bfloat16 x for one, and say
    which they return: `jax.numpy_dtype_promotion("strict")` is for the caller's own code.
    """

    @functools.wraps(f)
    def promoted(*args: F.args, **kwargs: F.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"):
            return f(*args, **kwargs)

    return promoted


def shape_of(v: ArrayLike) -> tuple[int, ...]:
    """v's shape, as a tuple: exporters to ONNX have an operation in place of `jnp.shape`."""
    if isinstance(v, bool | int | float | complex):
        return ()
    shape = getattr(v, "shape", None)
    return jnp.shape(v) if shape is None else shape


def as_axes(axis: Axes) -> int | tuple[int, ...]:
    """Axes that can be read more than once, which an iterator cannot."""
    if isinstance(axis, Iterable) and getattr(axis, "ndim", 1):
        return tuple(map(operator.index, axis))
    return operator.index(axis)  # type: ignore[reportArgumentType]  # or a TypeError


def split_axes(shape: tuple[int, ...], axis: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The feature axes and the axes to reduce, both non-negative and ascending."""
    rank, axis = len(shape), as_axes(axis)
    axes = axis if isinstance(axis, tuple) else (axis,)
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


def check_features(x: jax.Array, axis: Axes, **vectors: ArrayLike | None) -> None:
    """Raises a ValueError that names the first vector that is not of shape `[features]`."""
    features = feature_shape(x.shape, axis)
    for name, v in vectors.items():
        if v is not None and shape_of(v) != features:
            raise ValueError(
                f"{name} of shape {shape_of(v)} for {features} features: an input of shape "
                f"{x.shape} with feature axis {axis}"
            )


def widen(x: jax.Array, axis: Axes, **vectors: ArrayLike | None) -> list[Any]:
    """Each vector in x's rank, so that it broadcasts against x.

    A vector is of shape `[features]`; or of x's rank, with x's sizes on the feature axes
    and x's or 1 on the others: one value per example, say.

    Raises:
      ValueError: it is neither.
    """
    kept, reduced = split_axes(x.shape, axis)
    wide = []
    for name, v in vectors.items():
        if v is not None and len(shape_of(v)) == x.ndim:
            allowed = [(s,) if a in kept else (1, s) for a, s in enumerate(x.shape)]
            if all(s in sizes for s, sizes in zip(shape_of(v), allowed, strict=True)):
                wide.append(jnp.asarray(v))
                continue
        check_features(x, axis, **{name: v})
        wide.append(None if v is None else jnp.expand_dims(v, reduced))
    return wide


def widen_epsilon(x: jax.Array, axis: Axes, epsilon: jax.Array | float) -> jax.Array | float:
    """A number as it is; epsilons per feature, or of x's rank, as `widen` does scales."""
    return epsilon if shape_of(epsilon) == () else widen(x, axis, epsilon=epsilon)[0]


def accumulation_dtype(x: jax.Array) -> jnp.dtype:
    """float32 for half precision and float32, float64 for float64; complex for complex."""
    # Of 8 bits and fewer JAX promotes nothing.
    if not jnp.issubdtype(x.dtype, jnp.inexact) or jnp.finfo(x.dtype).bits < 16:
        raise TypeError(
            f"batch normalisation of {x.dtype} input: cast it to a floating-point dtype of 16 "
            "bits or more"
        )
    return jnp.promote_types(x.dtype, jnp.float32)


def real_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of x's variance: float32 or float64."""
    return jnp.finfo(accumulation_dtype(x)).dtype


def is_stored_wide(dtype: jnp.dtype) -> bool:
    """Returns whether XLA on CPU stores a float32 copy for several reductions: of bfloat16.

    It reads that back for each of them: half the time of a layer, and two thirds of its
    memory. (Of float16, and of what is masked, it does so whatever the names.)
    """
    return dtype == jnp.bfloat16


def apart(v: jax.Array, *beside: jax.Array) -> jax.Array:
    """v, on CPU under a name of its own if `is_stored_wide`; `beside` makes another name."""
    if not is_stored_wide(v.dtype):
        return v
    return lax.platform_dependent(v, *beside, cpu=_behind_barrier, default=_as_it_is)


def _behind_barrier(*arrays):
    return lax.optimization_barrier(arrays)[0]


def _as_it_is(v, *_):
    return v


def sharing(x: jax.Array) -> int:
    """The number of devices that share x, without those of `pmap` and `shard_map`."""
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[name] for name in (*mesh.auto_axes, *mesh.explicit_axes))


def inverse_std(var: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """1/sqrt(var + epsilon), and NaN where var is infinite.

    Divided by infinity all that overflowed would be 0, and y the bias without a word.
    """
    r = lax.rsqrt(var + epsilon)
    # Not var < inf, for which XLA would compute var again wherever r is used.
    return jnp.where(r > 0, r, jnp.nan)


def abs2(v: jax.Array) -> jax.Array:
    """|v|^2, real."""
    return jnp.real(v * jnp.conj(v)) if jnp.iscomplexobj(v) else v**2


def weights(x: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """The mask, bool or weights in the dtype of x's variance, a constant to differentiation.

    Weights that are negative or infinite are NaN, which every sum that they are in shows.
    """
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
    if mask.dtype == jnp.bool_:
        return mask
    if jnp.iscomplexobj(mask):
        raise TypeError(f"a mask of {mask.dtype}: it must be bool, or of real weights")
    w = lax.stop_gradient(mask.astype(real_dtype(x)))
    return jnp.where((w >= 0) & (w < jnp.inf), w, jnp.nan)


def counts(w: jax.Array) -> jax.Array:
    """Where the weights are not 0."""
    return w if w.dtype == jnp.bool_ else w != 0


def weigh(v: jax.Array, w: jax.Array | None) -> jax.Array:
    """w v, and 0 where w is 0 whatever v is there (padding may hold NaN)."""
    if w is None:
        return v
    return jnp.where(counts(w), v if w.dtype == jnp.bool_ else w * v, 0)


def in_units(w: jax.Array, reduced: tuple[int, ...]) -> tuple[jax.Array, jax.Array | float]:
    """w / unit and the unit, the power of two of each feature's largest weight (bool: 1).

    Sums of weights of 1e37 would overflow; those below 1.2e-38 XLA on CPU takes for 0, in
    products and in comparisons, so that they are read off their bits.
    """
    if w.dtype == jnp.bool_:
        return w, 1.0
    info = jnp.finfo(w.dtype)
    bits = lax.bitcast_convert_type(w, jnp.dtype(f"int{info.bits}"))
    bits &= jnp.iinfo(bits.dtype).max  # of -0, too
    bias = int(info.maxexp) - 1
    exponent = jnp.max(bits, axis=reduced, keepdims=True) >> info.nmant
    exponent = jnp.clip(exponent, 1, 2 * bias - 1)

    def power(e):  # of two, of which the bits of the exponent are e; 0 below the smallest
        return lax.bitcast_convert_type(jnp.maximum(e, 0) << info.nmant, w.dtype)

    # One factor: XLA would make another product of two, with a constant below the smallest.
    tiny = bits.astype(w.dtype) * power(bias + 1 - info.nmant - exponent)
    scaled = jnp.where(bits < 1 << info.nmant, tiny, w * power(2 * bias - exponent))
    return scaled, power(exponent)


def check_some(x: jax.Array) -> None:
    """Raises a ValueError where x has no elements."""
    if x.size == 0:
        raise ValueError(f"no elements to normalise over in an input of shape {x.shape}")


def at_least_one(**number: int) -> int:
    """The number as an int.

    Raises:
      TypeError: it is no integer, or a bool; the message has its name.
      ValueError: it is less than 1.
    """
    ((name, n),) = number.items()
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name}={' '.join(repr(n).split())}: it must be a whole number")
    if operator.index(n) < 1:
        raise ValueError(f"{name}={n}: it must be a whole number, 1 or more")
    return operator.index(n)


def sum_of_weights(x: jax.Array, reduced: tuple[int, ...], w: jax.Array | None) -> jax.Array:
    """Sum of the weights per feature; `[]` unless the mask differs between features."""
    if w is None:
        count = math.prod(x.shape[a] for a in reduced)
        return jnp.asarray(count, real_dtype(x))
    # Each element of a broadcast mask stands for this many of x.
    repeats = math.prod(x.shape[a] for a in reduced if w.shape[a] == 1)
    return per_feature(repeats * jnp.sum(w, axis=reduced, dtype=real_dtype(x)), x, reduced)


def per_feature(v: jax.Array, x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """v of the kept axes, `[features]`; `[]` where it is one number."""
    kept = tuple(s for a, s in enumerate(x.shape) if a not in reduced)
    return v.reshape(()) if v.size == 1 else jnp.broadcast_to(v, kept)


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


def shards(v: jax.Array, axis: int) -> int:
    """The number of devices that an axis is shared by on an explicit mesh."""
    sharding = jax.typeof(v).sharding
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def sharded_like(v: jax.Array, names, axis: int = 0) -> P | None:
    """v's spec with the `axis` sharded over these names; None but on an explicit mesh."""
    sharding = jax.typeof(v).sharding
    if not sharding.mesh.explicit_axes:
        return None
    return P(*(names if a == axis else s for a, s in enumerate(sharding.spec)))


def shard(v: jax.Array, names, axis: int = 0) -> jax.Array:
    """v with the `axis` sharded over these names, on an explicit mesh (None: on no axis)."""
    spec = sharded_like(v, names, axis)
    return v if spec is None else jax.sharding.reshard(v, spec)
