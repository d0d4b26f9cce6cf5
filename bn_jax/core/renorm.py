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

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from bn_jax.core.arrays import (
    accumulation_dtype,
    as_axes,
    check_features,
    inverse_std,
    promoting,
    shape_of,
    widen,
)
from bn_jax.core.batch_norm import Settings, normalized, refuse_single, result_type
from bn_jax.core.eager import one_program
from bn_jax.core.moments import Moments
from bn_jax.core.numbers import check_epsilon, check_number
from bn_jax.core.running import BatchStats
from bn_jax.core.sync import sync as _sync

Bound = float | jax.Array | Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Ramp:
    # No closure: layers are pickled with their bounds, and compared by them.
    start: float
    stop: float
    first: float
    last: float

    @promoting
    def __call__(self, count: jax.Array) -> jax.Array:
        ends = jnp.array([self.first, self.last])
        return jnp.interp(count, ends, jnp.array([self.start, self.stop]))


def ramp(
    start: float, stop: float, first: float, last: float
) -> Callable[[jax.Array], jax.Array]:
    """Schedule: `start` up to update `first`, `stop` from `last` on, linear in between."""
    return _Ramp(start, stop, first, last)


# Ioffe 2017, section 4: batch normalisation for 5,000 updates, then gradually less of it.
PAPER_R_MAX = ramp(1.0, 3.0, 5_000, 40_000)
PAPER_D_MAX = ramp(0.0, 5.0, 5_000, 25_000)


@promoting
def batch_renorm(
    x: jax.Array,
    stats: BatchStats,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    r_max: Bound = 3.0,
    d_max: Bound = 5.0,
    axis=-1,
    epsilon: jax.Array | float = 1e-5,
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
      others: as in `batch_norm`; epsilon is a number, or `[features]`.

    Returns:
      y and the Moments of the batch, as `batch_norm`.

    Raises:
      TypeError, ValueError: as `batch_norm`; or smaller bounds, where they are known.
    """
    x, axis = jnp.asarray(x), as_axes(axis)
    accumulation_dtype(x)  # refuses integers and the like
    check_features(x, axis, mean=stats.mean, var=stats.var)
    check_epsilon(epsilon)
    check_features(x, axis, epsilon=None if shape_of(epsilon) == () else epsilon)
    if not allow_single:
        refuse_single(x.shape, axis, axis_name, axis_index_groups)
    r, d = (b(stats.count) if callable(b) else b for b in (r_max, d_max))
    check_bounds(r, d, features=stats.var.shape)
    dtype = result_type(dtype, x, scale, bias)
    settings = Settings.of(axis, axis_name, axis_index_groups, activation, dtype, sync)
    return _batch_renorm(settings, x, stats, scale, bias, epsilon, mask, r, d)


@one_program
def _batch_renorm(settings, x, stats, scale, bias, epsilon, mask, r_max, d_max):
    batch = settings.moments(x, mask)
    r, d = lax.stop_gradient(_corrections(batch, stats, r_max, d_max, epsilon))
    r, d, scale, bias = widen(x, settings.axis, r=r, d=d, scale=scale, bias=bias)
    shift = d if scale is None else d * scale
    r = r if scale is None else r * scale
    shift = shift if bias is None else shift + bias
    return normalized(settings, x, batch, r, shift, epsilon, mask), batch


def check_bounds(
    r_max: Bound, d_max: Bound, *, features: tuple[int, ...] | None = None
) -> None:
    """Raises, as `check_number`, unless they are at least 1 and 0, or schedules."""
    for name, v, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if not callable(v):
            wanted = f"a number of at least {least}"
            check_number(name, v, least, wanted=wanted, features=features)


def _corrections(batch, stats, r_max, d_max, epsilon):
    r_running = inverse_std(stats.var, epsilon)
    r = jnp.sqrt(batch.var + epsilon) * r_running
    d = (batch.mean - stats.mean) * r_running
    # A batch without elements has nothing to be corrected by.
    seen = batch.count != 0
    r, d = jnp.where(seen, r, 1), jnp.where(seen, d, 0)
    size = jnp.abs(d)
    d = jnp.where(size > d_max, d * (d_max / jnp.where(size > 0, size, 1)), d)
    return jnp.clip(r, 1 / r_max, r_max), d
