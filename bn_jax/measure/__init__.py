"""Measuring convergence: sweeps of runs, and statistics over their records."""

from bn_jax.measure.convergence import steps_to_target
from bn_jax.measure.grid import Budget, Point
from bn_jax.measure.summary import summarize
from bn_jax.measure.sweep import Evaluation, sweep

__all__ = ["Budget", "Evaluation", "Point", "steps_to_target", "summarize", "sweep"]
