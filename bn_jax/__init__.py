"""Batch normalisation in JAX: pure functions with explicit statistics."""

from bn_jax.core.batch_norm import batch_norm, normalize
from bn_jax.core.moments import Moments, merge, moments
from bn_jax.core.running import BatchStats, ema

__all__ = ["BatchStats", "Moments", "batch_norm", "ema", "merge", "moments", "normalize"]
