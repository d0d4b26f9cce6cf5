"""Batch normalisation in JAX: pure functions with explicit statistics."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bn_jax.core.batch_norm import batch_norm, normalize
    from bn_jax.core.domains import domain_batch_norm, domain_normalize
    from bn_jax.core.ghost import ghost_batch_norm
    from bn_jax.core.moments import Moments, merge, moments
    from bn_jax.core.renorm import batch_renorm
    from bn_jax.core.running import (
        BatchStats,
        cumulative_mean,
        debiased_ema,
        ema,
        skip_nonfinite,
    )

__version__ = "0.1.0"

_MODULES = {
    "batch_norm": ("batch_norm", "normalize"),
    "domains": ("domain_batch_norm", "domain_normalize"),
    "ghost": ("ghost_batch_norm",),
    "moments": ("Moments", "merge", "moments"),
    "renorm": ("batch_renorm",),
    "running": ("BatchStats", "cumulative_mean", "debiased_ema", "ema", "skip_nonfinite"),
}
__all__ = [
    "BatchStats",
    "Moments",
    "batch_norm",
    "batch_renorm",
    "cumulative_mean",
    "debiased_ema",
    "domain_batch_norm",
    "domain_normalize",
    "ema",
    "ghost_batch_norm",
    "merge",
    "moments",
    "normalize",
    "skip_nonfinite",
]


def __getattr__(name):
    # On first use: `python -m experiments.<name> --help` need not wait seconds for JAX.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"bn_jax.core.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
