"""Running statistics: what training leaves behind for inference."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bn_jax.core.moments import Moments


class BatchStats(NamedTuple):
    """Running mean and variance `[features]`, and the number of updates so far (int32)."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array

    @classmethod
    def create(cls, features: tuple[int, ...], dtype=jnp.float32) -> BatchStats:
        """Mean 0, variance 1, no updates."""
        return cls(jnp.zeros(features, dtype), jnp.ones(features, dtype), jnp.int32(0))


def ema(
    stats: BatchStats, moments: Moments, *, momentum: float = 0.99, unbiased: bool = False
) -> BatchStats:
    """Exponential moving average; `momentum` is the weight of the old value.

        mean <- momentum mean + (1 - momentum) moments.mean,    var alike

    A feature of which the batch had no elements (`moments.count` 0) keeps its statistics;
    `count` goes up all the same.
    The dtype of the statistics never changes; the arithmetic is in the wider of theirs
    and the moments'.

    Args:
      stats: the statistics so far.
      moments: of one batch.
      momentum: in [0, 1]; may be traced.
      unbiased: average var n/(n-1), the unbiased estimate, as torch and Algorithm 2 of
        Ioffe & Szegedy 2015 do, in place of the biased one, as Flax and Keras do.
    """
    var = unbiased_var(moments) if unbiased else moments.var
    # Not in the dtype of the statistics: .999 in bfloat16 is 1.
    dtype = jnp.promote_types(moments.mean.dtype, stats.mean.dtype)
    keep = jnp.where(moments.count > 0, momentum, 1).astype(dtype)
    new = jnp.where(moments.count > 0, 1 - momentum, 0).astype(dtype)
    return BatchStats(
        (keep * stats.mean.astype(dtype) + new * moments.mean).astype(stats.mean.dtype),
        (keep * stats.var.astype(dtype) + new * var).astype(stats.var.dtype),
        stats.count + 1,
    )


def unbiased_var(moments: Moments) -> jax.Array:
    """Bessel's correction, n/(n-1) var (Ioffe & Szegedy 2015, Algorithm 2); 0 for n <= 1."""
    freedom = moments.count - 1
    factor = jnp.where(freedom > 0, moments.count / jnp.where(freedom > 0, freedom, 1), 0)
    return factor * moments.var
