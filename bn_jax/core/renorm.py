"""Batch renormalisation: training that sees what inference will see.

Ioffe 2017, "Batch Renormalization": with sigma = sqrt(var + epsilon), of the batch (B) and of
the running statistics, and constants to differentiation

    r = clip(sigma_B / sigma, 1/r_max, r_max)
    d = clip((mean_B - mean) / sigma, -d_max, d_max)
    y = scale ((x - mean_B) / sigma_B r + d) + bias

which is batch normalisation with scale r and bias + scale d, and where nothing is clipped
normalisation by the running statistics. Of complex d the absolute value is clipped. The
running variance is kept, as everywhere here, where the paper keeps a running sigma.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from bn_jax.core.arrays import check_features, widen
from bn_jax.core.batch_norm import normalize_batch, refuse_single, result_type
from bn_jax.core.moments import Moments, moments
from bn_jax.core.running import BatchStats
from bn_jax.core.sync import sync as _sync

Bound = float | Callable[[jax.Array], jax.Array]


def ramp(start: float, stop: float, first: int, last: int) -> Callable[[jax.Array], jax.Array]:
    """Schedule: `start` up to update `first`, `stop` from `last` on, linear in between."""

    def at(count: jax.Array) -> jax.Array:
        return jnp.interp(count, jnp.array([first, last]), jnp.array([start, stop]))

    return at


# Ioffe 2017, section 4: batch normalisation for 5,000 updates, then gradually less of it.
PAPER_R_MAX = ramp(1.0, 3.0, 5_000, 40_000)
PAPER_D_MAX = ramp(0.0, 5.0, 5_000, 25_000)


def batch_renorm(
    x: jax.Array,
    stats: BatchStats,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    r_max: Bound = 3.0,
    d_max: Bound = 5.0,
    axis=-1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name=None,
    axis_index_groups=None,
    sync=_sync,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
    allow_single: bool = False,
) -> tuple[jax.Array, Moments]:
    """Normalises x by the statistics of the batch, corrected towards the running ones.

    With r_max = 1 and d_max = 0 it is `batch_norm`, to the bit.

    Args:
      stats: the running statistics `[features]` before this batch.
      r_max, d_max: at least 1 and at least 0; numbers, or schedules that are called with
        `stats.count` (`PAPER_R_MAX`, `PAPER_D_MAX`, `ramp`).
      others: as in `batch_norm`.

    Returns:
      y and the Moments of the batch, as `batch_norm`.

    Raises:
      TypeError, ValueError: as `batch_norm`.
    """
    x = jnp.asarray(x)
    check_features(x, axis, mean=stats.mean, var=stats.var)
    if not allow_single:
        refuse_single(x.shape, axis, axis_name, axis_index_groups)
    common = {
        "axis": axis, "mask": mask,
        "axis_name": axis_name, "axis_index_groups": axis_index_groups,
    }  # fmt: skip
    batch = moments(x, **common, sync=sync)
    r, d = lax.stop_gradient(_corrections(batch, stats, r_max, d_max, epsilon))
    dtype = result_type(dtype, x, scale, bias)  # r and d are in float32 whatever x is
    r, d, scale, bias = widen(x, axis, r=r, d=d, scale=scale, bias=bias)
    shift = d if scale is None else d * scale
    y = normalize_batch(
        x, batch,
        r if scale is None else r * scale,
        shift if bias is None else shift + bias,
        **common, epsilon=epsilon, activation=activation, dtype=dtype,
    )  # fmt: skip
    return y, batch


def _corrections(batch, stats, r_max, d_max, epsilon):
    r_max, d_max = (b(stats.count) if callable(b) else b for b in (r_max, d_max))
    sigma = jnp.sqrt(stats.var + epsilon)
    r = jnp.sqrt(batch.var + epsilon) / sigma
    d = (batch.mean - stats.mean) / sigma
    # A batch without elements has nothing to be corrected by.
    seen = batch.count > 0
    r, d = jnp.where(seen, r, 1), jnp.where(seen, d, 0)
    size = jnp.abs(d)
    d = jnp.where(size > d_max, d * (d_max / jnp.where(size > 0, size, 1)), d)
    return jnp.clip(r, 1 / r_max, r_max), d
