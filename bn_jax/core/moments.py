"""The mean and variance of a batch, as one value that merges with others of its kind.

With weights w_i (1 where there is no mask) and n = sum_i w_i, per feature

    mean = 1/n sum_i w_i x_i        var = 1/n sum_i w_i |x_i - mean|^2

`var` is biased (Ioffe & Szegedy 2015, Algorithm 1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.core import sync as _sync
from bn_jax.core.arrays import (
    Axes,
    abs2,
    accumulation_dtype,
    apart,
    element_count,
    is_stored_wide,
    split_axes,
    weigh,
    weights,
)

LARGE = 1 << 16  # elements
ON_CHIP = 64 << 20  # bytes that XLA may keep on a TPU's chip, of 128 MiB there
NEAR = 2  # |mean| / std


class Moments(NamedTuple):
    """Mean, biased variance and number of elements of each feature.

    Attributes:
      mean: `[features]` (the kept axes of the input, in their order), float32 or float64
        (complex64 or complex128 of complex input).
      var: `[features]`, real, never negative.
      count: sum of the weights, float; of shape `[]`, or `[features]` where the mask
        differs between features. 0 means that nothing was seen: `mean` and `var` are 0.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


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
    of the squares passes 3.4e38 (a std of 1e17, say, of 3e4 elements) `var` is inf.

    Args:
      x: floating-point or complex array of any rank.
      axis: the feature axis, or axes, to keep.
      mask: bool, or non-negative weights; of x's rank and broadcastable to its shape.
        Where it is 0 the value of x does not matter, NaN included.
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
    alike = mask is None or jnp.asarray(mask).dtype == jnp.bool_
    local = _local_moments(x, reduced, weights(x, mask), alike)
    return local if axis_name is None else sync(local, axis_name, axis_index_groups)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two disjoint sets of elements from the moments of each.

        n = n_a + n_b    mean = mean_a + n_b/n (mean_b - mean_a)
        var = n_a/n var_a + n_b/n var_b + n_a/n n_b/n |mean_b - mean_a|^2

    Associative and commutative to rounding; Moments of count 0 are the identity.
    Source: Chan, Golub & LeVeque 1979, "Updating formulae", equation 2.1.
    """
    count = a.count + b.count
    part_b = b.count / jnp.where(count > 0, count, 1)
    part_a = 1 - part_b
    delta = b.mean - a.mean
    # Not of one that is empty, whose distance is the other's mean: its square may be inf.
    apart = jnp.where((a.count > 0) & (b.count > 0), delta, 0)
    return Moments(
        mean=a.mean + part_b * delta,
        var=part_a * a.var + part_b * b.var + part_a * part_b * abs2(apart),
        count=count,
    )


def _local_moments(
    x: jax.Array, reduced: tuple[int, ...], w: jax.Array | None, alike: bool
) -> Moments:
    """Of x with weights w, which are all 1 or 0 if `alike`."""
    count = element_count(x, reduced, w)
    some = jnp.where(count > 0, count, 1)

    def average(v):
        return jnp.sum(weigh(v, w), axis=reduced) / some

    dtype = accumulation_dtype(x)

    def twice(x):
        # Here and not only in the sums: the derivative of a weight of 0 times NaN is NaN.
        return _twice(x if w is None else jnp.where(w > 0, x, 0), dtype)

    # Of x as it came: one that is converted or masked XLA would store, on a TPU to slice it,
    # everywhere to branch.
    def about_sample(x):
        first, second = twice(x)
        # A mask may leave out the whole sample: then the shift is a mean of its own pass.
        shift = _sample_mean(x, reduced, dtype) if w is None else average(first)
        return _about(shift, first, second, reduced, average)

    if not _raw_sums_first(x):
        return Moments(*about_sample(x), count)
    first, second = twice(x)
    raw = first, abs2(second)
    # Both are 0 where w is: a boolean mask needs no product more, for which XLA on CPU would
    # store float32 arrays.
    sums = ((v if alike else w * v).sum(reduced) for v in raw)
    mean, square = (total / some for total in sums)
    var = square - abs2(mean)
    # The difference has 1 + mean^2 / var times the relative error of its terms; of a constant
    # 3e18 the sum of squares is inf, and of 3e-20 it is 0.
    std = jnp.sqrt(jnp.maximum(var, 0))
    near = jnp.all((jnp.abs(mean) <= NEAR * std) & (var < jnp.inf))
    return Moments(*lax.cond(near, lambda x: (mean, var), about_sample, x), count)


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


def _raw_sums_first(x):
    """Whether to sum x and x^2, and x - c only if a feature's mean is far from 0.

    On CPU XLA sums x itself in less than half the time of x - c: up to a fifth of a layer's
    forward and backward pass. Of a small x the branch takes what it saves, and under vmap, as
    sweeps have it for networks of small layers, both branches are computed. For TPUs XLA
    takes sums of x, but none of x - c, into the convolution that x comes from; but what it can
    keep on the chip it reads for nothing, and a branch would take it from there
    (`benchmarks.passes`). Devices that share x have collectives in a branch, which all of them
    take or none: a CPU's fake devices are spared that.
    """
    if not isinstance(x.size, int):  # not known yet (`jax.export`)
        return False
    if jax.default_backend() == "tpu":
        return x.size * x.dtype.itemsize > ON_CHIP
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and x.size >= LARGE


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
