"""Batch normalisation in JAX: pure functions with explicit statistics."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bn_jax.core.batch_norm import batch_norm, normalize
    from bn_jax.core.moments import Moments, merge, moments
    from bn_jax.core.running import BatchStats, cumulative_mean, debiased_ema, ema

_MODULES = {
    "batch_norm": ("batch_norm", "normalize"),
    "moments": ("Moments", "merge", "moments"),
    "running": ("BatchStats", "cumulative_mean", "debiased_ema", "ema"),
}
__all__ = [
    "BatchStats",
    "Moments",
    "batch_norm",
    "cumulative_mean",
    "debiased_ema",
    "ema",
    "merge",
    "moments",
    "normalize",
]


def __getattr__(name):
    # On first use: `python -m experiments.<name> --help` need not wait seconds for JAX.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"bn_jax.core.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
