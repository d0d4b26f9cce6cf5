"""The mean and variance of a batch, as one value that merges with others of its kind.

With weights w_i (1 where there is no mask) and n = sum_i w_i, per feature

    mean = 1/n sum_i w_i x_i        var = 1/n sum_i w_i |x_i - mean|^2

`var` is biased (Ioffe & Szegedy 2015, Algorithm 1). Weights say how much an element tells, in
any unit: three elements of weight 1/3 are three elements, as those of weight 1 are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from bn_jax.core import sync as _sync
from bn_jax.core.arrays import (
    Axes,
    abs2,
    accumulation_dtype,
    apart,
    check_some,
    counts,
    in_units,
    is_stored_wide,
    per_feature,
    promoting,
    sharing,
    split_axes,
    sum_of_weights,
    weigh,
    weights,
)

LARGE = 1 << 16  # elements
ON_CHIP = 64 << 20  # bytes that XLA may keep on a TPU's chip, of 128 MiB there
NEAR = 2  # |mean| / std


class _Fields(NamedTuple):
    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore  # not the method of tuples
    weight: jax.Array


class Moments(_Fields):
    """Mean, biased variance and number of elements of each feature.

    Attributes:
      mean: `[features]` (the kept axes of the input, in their order), float32 or float64
        (complex64 or complex128 of complex input).
      var: `[features]`, real, never negative.
      count: sum of the weights, float; of shape `[]`, or `[features]` where the mask
        differs between features. 0 means that nothing was seen: the others are 0, too.
      weight: sum_i w_i^2 / sum_i w_i, of count's shape: 1 where weights are 0 and 1, and what
        is taken where it is not given. count / weight is the number of elements of equal
        weight that tell as much (Kish 1965), whatever the unit of the weights.
    """

    __slots__ = ()

    def __new__(cls, mean: Any, var: Any, count: Any, weight: Any = None):
        if weight is None and count is not None:
            weight = jnp.ones_like(count)
        return super().__new__(cls, mean, var, count, weight)  # type: ignore[reportArgumentType]


# A program read in another process needs this module imported first, as `bn_jax.Moments` does.
export.register_namedtuple_serialization(Moments, serialized_name="bn_jax.Moments")


@promoting
def moments(
    x: jax.Array,
    *,
    axis: Axes = -1,
    mask: jax.Array | None = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    sync: Callable[..., Moments] = _sync.sync,
) -> Moments:
    """Mean and biased variance over every axis but the feature axes.

    Half-precision input is accumulated in float32, float64 in float64. The relative
    error of `var` in float32 stays below 1e-4 for |mean| up to 1e4 std: the sums are of
    x - c and |x - c|^2 with c the mean of a sample of x, so that neither waits for the
    other (with a mask c is the mean of all of x, in a pass of its own; on TPUs and one CPU c
    is 0 for a large x whose features all have |mean| up to 2 std). Where the sum
    of the squares passes 3.4e38 (a std of 1e17, say, of 3e4 elements) `var` is inf, and
    what is normalised by it NaN.

    Args:
      x: floating-point or complex array of any rank.
      axis: the feature axis, or axes, to keep.
      mask: bool, or non-negative weights, of any size whose sum is a float; of x's rank and
        broadcastable to its shape. Where it is 0 the value of x does not matter, NaN
        included. A weight that is negative, infinite or NaN makes what it has a part in NaN.
      axis_name: mapped axis (or axes) of `jax.pmap`, `jax.shard_map` or `jax.vmap` to
        gather over; every replica counts with the number of its elements.
      axis_index_groups: groups of indices within that axis, as `jax.lax.psum` takes them
        (here under `vmap` and `shard_map(check_vma=True)` too).
      sync: how replicas merge: `bn_jax.core.sync.sync`, or `sync_once` for one collective.

    Raises:
      TypeError: x is of integers or booleans.
      ValueError: an axis outside x's rank or named twice, no elements to average, or a
        mask of another rank or shape.
    """
    x = jnp.asarray(x)
    _, reduced = split_axes(x.shape, axis)
    check_some(x)
    local = _local_moments(x, reduced, weights(x, mask))
    return local if axis_name is None else sync(local, axis_name, axis_index_groups)


@promoting
def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two disjoint sets of elements from the moments of each.

        n = n_a + n_b    mean = mean_a + n_b/n (mean_b - mean_a)
        var = n_a/n var_a + n_b/n var_b + n_a/n n_b/n |mean_b - mean_a|^2

    and the weight as the mean. Associative and commutative to rounding; Moments of count 0
    are the identity.
    Source: Chan, Golub & LeVeque 1979, "Updating formulae", equation 2.1.
    """
    count = a.count + b.count
    part_b = b.count / jnp.where(count != 0, count, 1)
    part_a = 1 - part_b
    delta = b.mean - a.mean
    # Not of one that is empty, whose distance is the other's mean: its square may be inf.
    apart = jnp.where((a.count != 0) & (b.count != 0), delta, 0)
    return Moments(
        mean=a.mean + part_b * delta,
        var=part_a * a.var + part_b * b.var + part_a * part_b * abs2(apart),
        count=count,
        weight=a.weight + part_b * (b.weight - a.weight),
    )


def _local_moments(x: jax.Array, reduced: tuple[int, ...], w: jax.Array | None) -> Moments:
    alike = w is None or w.dtype == jnp.bool_
    w, count, weight, some = _totals(x, reduced, w, alike)

    def average(v):
        return jnp.sum(weigh(v, w), axis=reduced) / some

    dtype = accumulation_dtype(x)

    def twice(x):
        # Here and not only in the sums: the derivative of a weight of 0 times NaN is NaN.
        return _twice(x if w is None else jnp.where(counts(w), x, 0), dtype)

    # Of x as it came: one that is converted or masked XLA would store, on a TPU to slice it,
    # everywhere to branch.
    def about_sample(x):
        first, second = twice(x)
        # A mask may leave out the whole sample: then the shift is a mean of its own pass.
        shift = _sample_mean(x, reduced, dtype) if w is None else average(first)
        return _about(shift, first, second, reduced, average)

    def raw_first(x):
        first, second = twice(x)
        # Both are 0 where w is: a boolean mask needs no product more, for which XLA on CPU
        # would store float32 arrays.
        sums = (
            (v if w is None or alike else w * v).sum(reduced) for v in (first, abs2(second))
        )
        mean, square = (total / some for total in sums)
        var = square - abs2(mean)
        # The difference has 1 + mean^2 / var times the relative error of its terms; of a
        # constant 3e18 the sum of squares is inf, and of 3e-20 it is 0.
        std = jnp.sqrt(jnp.maximum(var, 0))
        near = jnp.all((jnp.abs(mean) <= NEAR * std) & (var < jnp.inf))
        return lax.cond(near, lambda x: (mean, var), about_sample, x)

    if raw := dict.fromkeys(_raw_sums_first(x), raw_first):
        mean, var = lax.platform_dependent(x, **raw, default=about_sample)
    else:
        mean, var = about_sample(x)
    return Moments(mean, var, count, weight)


def _totals(x, reduced, w, alike) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """w in units of its own, count and weight, and by what the sums with that w are divided."""
    w, unit = (w, 1) if alike else in_units(w, reduced)
    total = sum_of_weights(x, reduced, w)
    if alike:
        count, weight = total, jnp.minimum(total, 1)
    else:
        unit = per_feature(jnp.squeeze(unit, reduced), x, reduced)
        some = jnp.where(total != 0, total, 1)
        count, weight = total * unit, sum_of_weights(x, reduced, w**2) / some * unit
        # Below the smallest number it would be 0, as if there were no end of elements.
        weight = jnp.where((weight == 0) & (count != 0), jnp.nan, weight)
    # The sum of tiny weights may be 0 where that in their unit is not.
    return w, count, weight, jnp.where(count != 0, total, jnp.inf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _twice(x, dtype):
    """x in that dtype, for two sums; their gradients are added in it and rounded once."""
    if not is_stored_wide(x.dtype):
        wide = x.astype(dtype)  # once; else each sum has its own
        return wide, wide
    first = apart(x)
    return first.astype(dtype), apart(first).astype(dtype)


@_twice.defjvp
def _twice_jvp(dtype, primals, tangents):
    dx = tangents[0].astype(dtype)
    return _twice(*primals, dtype), (dx, dx)


def _about(shift, first, second, reduced, average):
    """Mean and variance by sums of x - shift and its square, each from an x of its own."""
    shift = lax.stop_gradient(jnp.expand_dims(shift, reduced))
    # Under one name XLA computes x - shift once, stores it, and reads it back for each of
    # the sums: 25 ms in place of 5 for 8M elements on two cores.
    same = lax.optimization_barrier(shift)
    error = average(first - shift)
    square = average(abs2(second - same))
    # Both may be inf, of which the difference is NaN.
    var = jnp.where(jnp.isinf(square), square, jnp.maximum(square - abs2(error), 0))
    return shift.reshape(error.shape) + error, var


def _raw_sums_first(x) -> tuple[str, ...]:
    """The platforms on which to sum x and x^2, and x - c only if a mean is far from 0.

    On CPU XLA sums x itself in less than half the time of x - c: up to a fifth of a layer's
    forward and backward pass. Of a small x the branch takes what it saves, and under vmap, as
    sweeps have it for networks of small layers, both branches are computed. For TPUs XLA
    takes sums of x, but none of x - c, into the convolution that x comes from; but what it can
    keep on the chip it reads for nothing, and a branch would take it from there
    (`benchmarks.passes`). Devices that share x have collectives in a branch, which all of them
    take or none: a CPU's fake devices are spared that.
    """
    if not isinstance(x.size, int):  # not known yet (`jax.export`)
        return ()
    tpu = ("tpu",) if x.size * x.dtype.itemsize > ON_CHIP else ()
    return tpu if x.size < LARGE or sharing(x) > 1 else ("cpu", *tpu)


def _sample_mean(x, reduced, dtype):
    """The mean of at least every 256th element, and of at least 16.

    Of n elements s have a mean within sqrt(n/s) std of the mean of all, whatever the
    data and their order (Cauchy-Schwarz), so that square - error^2 loses no more than a
    factor of 257 of float32's precision.
    """
    elements = math.prod(x.shape[a] for a in reduced)
    strides = [1] * x.ndim
    # A size that is not known yet (`jax.export`) has no stride: all of x is taken.
    left = max(1, min(256, elements // 16)) if isinstance(elements, int) else 1
    # An axis that is sharded under an explicit mesh cannot be sliced: all of it is taken.
    sharded = jax.typeof(x).sharding.spec
    for a in (a for a in reversed(reduced) if left > 1 and sharded[a] is None):
        strides[a] = max(1, min(x.shape[a], left))
        left //= strides[a]
    sample = lax.slice(x, (0,) * x.ndim, x.shape, strides)
    return jnp.mean(sample, axis=reduced, dtype=dtype)
