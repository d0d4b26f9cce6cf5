"""What other frameworks' BatchNorm computes, as settings of ours.

Sources: Flax 0.12, torch 2.13, Keras 3.15, Haiku 0.0.17, Equinox 0.13 (`mode="batch"`), and
Ioffe & Szegedy 2015, Algorithm 2, which averages over all batches and states no epsilon.
torch's momentum is the weight of the new value: its 0.1 is 0.9 here. Haiku has no default
decay rate.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from bn_jax.core.arrays import promoting
from bn_jax.core.moments import Moments
from bn_jax.core.running import (
    BatchStats,
    blend,
    cumulative_mean,
    debiased_ema,
    debiased_weight,
    ema,
    with_variance,
)


@promoting
def equinox_ema(
    stats: BatchStats, moments: Moments, *, momentum: float = 0.99, unbiased: bool = False
) -> BatchStats:
    """Equinox's running statistics: `debiased_ema`, and the variance plus m^t/(1 - m^t).

    Its hidden variance starts from 1 and is divided by 1 - m^t as if it had started from 0:
    with momentum m = 0.99 it is 99 too large after one update, 0.58 after 100. For models
    that were trained with it.
    """
    new = debiased_weight(stats, momentum)
    old = jnp.where(stats.count == 0, momentum / (1 - momentum), 1 - new)
    return blend(stats, with_variance(moments), old, new, unbiased)


PRESETS: dict[str, dict[str, Any]] = {
    "flax": {"estimator": ema, "momentum": 0.99, "epsilon": 1e-5, "unbiased": False},
    "torch": {"estimator": ema, "momentum": 0.9, "epsilon": 1e-5, "unbiased": True},
    "keras": {"estimator": ema, "momentum": 0.99, "epsilon": 1e-3, "unbiased": False},
    "haiku": {"estimator": debiased_ema, "epsilon": 1e-5, "unbiased": False},
    "equinox": {"estimator": equinox_ema, "momentum": 0.99, "epsilon": 1e-5, "unbiased": False},
    "paper": {"estimator": cumulative_mean, "epsilon": 1e-5, "unbiased": True},
}


def preset(framework: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The settings of `framework`, with `fields` in place of its own where both have one.

    Raises:
      ValueError: an unknown framework.
    """
    if framework not in PRESETS:
        raise ValueError(f"no preset for {framework!r}: there are {', '.join(PRESETS)}")
    return PRESETS[framework] | fields
