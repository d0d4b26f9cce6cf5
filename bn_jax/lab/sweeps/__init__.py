"""Sweeps of runs over a grid, on the devices that there are."""

from bn_jax.lab.statistics.records import Budget, Point
from bn_jax.lab.sweeps.sweep import Evaluation, sweep

__all__ = ["Budget", "Evaluation", "Point", "sweep"]
