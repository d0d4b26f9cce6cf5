"""Running statistics: what training leaves behind for inference.

Every estimator is (stats, moments) -> stats, and moves each statistic towards the batch's:

    mean <- mean + a (moments.mean - mean),    var alike

They differ in the weight a of the new value. A feature of which the batch had no elements
(`moments.count` 0) keeps its statistics. One of which it had a single element has no variance
(`has_variance`): its running variance stays, biased or not, and the batch is no update of the
count. `ema` moves its mean all the same; the averages that depend on the count leave it.
The dtype of the statistics never changes, so that they can be carried through a scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from bn_jax.core.arrays import promoting, shard, vary, varying
from bn_jax.core.moments import Moments
from bn_jax.core.numbers import check_momentum, check_number

BELOW_1 = math.nextafter(1, 0)


class BatchStats(NamedTuple):
    """Running mean and variance `[features]`, and the number of its updates so far (int32).

    The count is `[]`, or `[features]` for features that batches may lack (masks per feature,
    `skip_nonfinite`): an average over the updates needs to know the number of each.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore  # not the method of tuples

    @classmethod
    def create(
        cls,
        features: tuple[int, ...],
        dtype=jnp.float32,
        *,
        domains: int | None = None,
        per_feature: bool = False,
    ) -> BatchStats:
        """Mean 0, variance 1, no updates.

        Args:
          features: shape of the statistics.
          dtype: of the mean; where it is complex the variance is real.
          domains: makes as many sets of statistics, along a first axis.
          per_feature: count the updates of each feature.
        """
        first = () if domains is None else (domains,)
        shape = (*first, *features)
        var = jnp.ones(shape, jnp.finfo(dtype).dtype)
        count = jnp.zeros(shape if per_feature else first, jnp.int32)
        return cls(jnp.zeros(shape, dtype), var, count)


export.register_namedtuple_serialization(BatchStats, serialized_name="bn_jax.BatchStats")


@promoting
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
      momentum: the weight of the old value, in [0, 1], or `[features]` of them; may be
        traced; or a schedule, called with `stats.count`.
      unbiased: average `unbiased_var`, as torch and Algorithm 2 of Ioffe & Szegedy 2015
        do, in place of the biased one, as Flax and Keras do.

    Raises:
      TypeError, ValueError: a momentum that is known to be no such number, or of another
        shape, here and in the other estimators.
    """
    old = momentum(stats.count) if callable(momentum) else momentum
    check_momentum(old, features=stats.var.shape)
    return blend(stats, moments, old, 1 - old, unbiased)


@promoting
def debiased_ema(
    stats: BatchStats, moments: Moments, *, momentum: float = 0.99, unbiased: bool = False
) -> BatchStats:
    """Exponential moving average of the batches alone: a = (1 - momentum)/(1 - momentum^t).

    At update t the statistics are the average with weights momentum^(t-i) of batches
    i = 1 .. t, with nothing of what they started from: Haiku's and Adam's (Kingma & Ba
    2015, section 3) correction, of which only the corrected value is kept. Arguments as
    for `ema`, but momentum is a number in [0, 1). t is of `stats.count`: where batches lack
    features count `per_feature`.
    """
    new = debiased_weight(stats, momentum)
    return blend(stats, with_variance(moments), 1 - new, new, unbiased)


@promoting
def debiased_weight(stats: BatchStats, momentum: float) -> jax.Array:
    """(1 - momentum)/(1 - momentum^t) at update t = count + 1."""
    if callable(momentum):
        raise TypeError("a debiased average has one momentum, not a schedule: use ema")
    wanted = "a number of at least 0 and below 1"
    check_number("momentum", momentum, 0, BELOW_1, wanted=wanted, features=stats.var.shape)
    t = _update_number(stats)
    # 1 - momentum^t, of which float32 would have no digit left at momentum 1 - 1e-6.
    left = -jnp.expm1(t * jnp.log1p(-jnp.asarray(1 - momentum, t.dtype)))
    return jnp.where(t > 1, (1 - momentum) / left, 1)


@promoting
def cumulative_mean(
    stats: BatchStats, moments: Moments, *, momentum: None = None, unbiased: bool = False
) -> BatchStats:
    """The mean over all batches with a variance: a = 1/t at update t (as in `debiased_ema`).

    It has no momentum: a layer's is not used.

    With `unbiased=True` and batches of one size this is torch's `momentum=None`, and
    Algorithm 2 of Ioffe & Szegedy 2015 on the batches seen.
    """
    if not (momentum is None or callable(momentum)):
        check_momentum(momentum)
    new = 1 / _update_number(stats)
    return blend(stats, with_variance(moments), 1 - new, new, unbiased)


@promoting
def skip_nonfinite(moments: Moments) -> Moments:
    """The moments, as of no elements for the features whose mean or variance is not finite.

    `ema(stats, skip_nonfinite(moments))` is not poisoned by a batch that overflowed.
    """
    finite = jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)
    return Moments(*(jnp.where(finite, v, 0) for v in moments))


@promoting
def has_variance(moments: Moments) -> jax.Array:
    """Where more than one element was seen, of count's shape: count / weight > 1 + 1e-5.

    Float32 would not have a digit of a variance, however it is corrected, of which one element
    had all but 1e-6 of the weight.
    """
    # NaN has one: it is to be seen in the statistics.
    return ~(moments.count <= (1 + 1e-5) * moments.weight)


@promoting
def with_variance(moments: Moments) -> Moments:
    """The moments, as of no elements for the features without a variance.

    An average whose weights depend on the number of updates counts those of mean and variance
    alike: were the mean alone to move, the variance would keep some of what it started from.
    """
    return moments._replace(count=jnp.where(has_variance(moments), moments.count, 0))


@promoting
def unbiased_var(moments: Moments) -> jax.Array:
    """Bessel's correction, var / (1 - sum w^2 / (sum w)^2); 0 where there is no variance.

    Where weights are 0 and 1 it is n/(n-1) var (Ioffe & Szegedy 2015, Algorithm 2). The unit
    of the weights has no part in it: they are reliability weights, and not frequencies.
    """
    known = has_variance(moments)
    freedom = jnp.where(known, moments.count - moments.weight, 1)
    return jnp.where(known, moments.count / freedom, 0) * moments.var


def each(
    estimator: Callable[..., BatchStats], stats: BatchStats, groups: Moments
) -> BatchStats:
    """The estimator applied to one after another of Moments along a first axis."""

    def one(stats, moments):
        return estimator(stats, moments), None

    def shared_out(v):
        for a, names in enumerate(jax.typeof(groups.mean).sharding.spec[1 : v.ndim + 1]):
            v = v if names is None else shard(v, names, a)
        return v

    # What a scan asks of its arguments under shard_map and under an explicit mesh.
    stats = jax.tree.map(shared_out, vary(stats, varying(groups)))
    return lax.scan(one, stats, jax.tree.map(lambda v: shard(v, None), groups))[0]


def _update_number(stats):
    return (stats.count + 1).astype(jnp.promote_types(stats.var.dtype, jnp.float32))


@promoting
def blend(stats: BatchStats, moments: Moments, old, new, unbiased: bool) -> BatchStats:
    """old stats + new moments: what every estimator here comes down to.

    The weights are two because 1 - old loses digits that an old near 1 does not have.
    Whatever was not seen keeps its statistic; the count is of updates of the variance.
    """
    if jnp.iscomplexobj(moments.mean) and not jnp.iscomplexobj(stats.mean):
        raise TypeError(
            f"complex batch statistics for a running mean of {stats.mean.dtype}: create that "
            "with dtype complex64 (BatchStats.create(features, jnp.complex64))"
        )
    var = unbiased_var(moments) if unbiased else moments.var
    seen = moments.count != 0
    known = seen & has_variance(moments)

    def weighted(before, value, seen):
        # Not in the dtype of the statistics: .999 in bfloat16 is 1.
        dtype = jnp.promote_types(value.dtype, before.dtype)
        parts = jnp.where(seen, old, 1), jnp.where(seen, new, 0)
        w_old, w_new = (w.astype(jnp.finfo(dtype).dtype) for w in parts)
        return (w_old * before.astype(dtype) + w_new * value).astype(before.dtype)

    return BatchStats(
        weighted(stats.mean, moments.mean, seen),
        weighted(stats.var, var, known),
        stats.count + (known if stats.count.ndim else jnp.any(known)),
    )
