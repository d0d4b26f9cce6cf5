"""Running statistics: what training leaves behind for inference.

Every estimator is (stats, moments) -> stats, and moves each statistic towards the batch's:

    mean <- mean + a (moments.mean - mean),    var alike

They differ in the weight a of the new value. A feature of which the batch had no elements
(`moments.count` 0) keeps its statistics, and a batch without any elements is not counted.
The dtype of the statistics never changes, so that they can be carried through a scan.
"""

from __future__ import annotations

from collections.abc import Callable
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
    stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | Callable[[jax.Array], jax.Array] = 0.99,
    unbiased: bool = False,
) -> BatchStats:
    """Exponential moving average: a = 1 - momentum.

    Args:
      stats: the statistics so far.
      moments: of one batch.
      momentum: the weight of the old value, in [0, 1]; may be traced; or a schedule, called
        with `stats.count`.
      unbiased: average var n/(n-1), the unbiased estimate, as torch and Algorithm 2 of
        Ioffe & Szegedy 2015 do, in place of the biased one, as Flax and Keras do.
    """
    old = momentum(stats.count) if callable(momentum) else momentum
    return _update(stats, moments, old, 1 - old, unbiased)


def debiased_ema(
    stats: BatchStats, moments: Moments, *, momentum: float = 0.99, unbiased: bool = False
) -> BatchStats:
    """Exponential moving average of the batches alone: a = (1 - momentum)/(1 - momentum^t).

    At update t the statistics are the average with weights momentum^(t-i) of batches
    i = 1 .. t, with nothing of what they started from: Haiku's and Adam's (Kingma & Ba
    2015, section 3) correction, of which only the corrected value is kept. Arguments as
    for `ema`, but momentum is a number in [0, 1).
    """
    t = (stats.count + 1).astype(jnp.float32)
    # 1 - momentum^t, of which float32 would have no digit left at momentum 1 - 1e-6.
    left = -jnp.expm1(t * jnp.log1p(-jnp.asarray(1 - momentum, t.dtype)))
    new = jnp.where(t > 1, (1 - momentum) / left, 1)
    return _update(stats, moments, 1 - new, new, unbiased)


def cumulative_mean(
    stats: BatchStats, moments: Moments, *, unbiased: bool = False
) -> BatchStats:
    """The mean over all batches so far: a = 1/t at update t.

    With `unbiased=True` and batches of one size this is torch's `momentum=None`, and
    Algorithm 2 of Ioffe & Szegedy 2015 on the batches seen.
    """
    new = 1 / (stats.count + 1).astype(jnp.float32)
    return _update(stats, moments, 1 - new, new, unbiased)


def skip_nonfinite(moments: Moments) -> Moments:
    """The moments, as of no elements for the features whose mean or variance is not finite.

    `ema(stats, skip_nonfinite(moments))` is not poisoned by a batch that overflowed.
    """
    finite = jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)
    return Moments(*(jnp.where(finite, v, 0) for v in moments))


def unbiased_var(moments: Moments) -> jax.Array:
    """Bessel's correction, n/(n-1) var (Ioffe & Szegedy 2015, Algorithm 2); 0 for n <= 1."""
    freedom = moments.count - 1
    factor = jnp.where(freedom > 0, moments.count / jnp.where(freedom > 0, freedom, 1), 0)
    return factor * moments.var


def _update(stats, moments, old, new, unbiased):
    """old and new are the weights: 1 - old loses digits that an old near 1 does not have."""
    var = unbiased_var(moments) if unbiased else moments.var
    # Not in the dtype of the statistics: .999 in bfloat16 is 1.
    dtype = jnp.promote_types(moments.mean.dtype, stats.mean.dtype)
    seen = moments.count > 0
    old, new = (jnp.where(seen, w, e).astype(dtype) for w, e in ((old, 1), (new, 0)))
    return BatchStats(
        (old * stats.mean.astype(dtype) + new * moments.mean).astype(stats.mean.dtype),
        (old * stats.var.astype(dtype) + new * var).astype(stats.var.dtype),
        stats.count + jnp.any(seen),
    )
