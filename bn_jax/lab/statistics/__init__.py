"""Statistics over the records of runs."""

from bn_jax.lab.statistics.convergence import steps_to_target
from bn_jax.lab.statistics.records import Budget, Point, Record, Seconds
from bn_jax.lab.statistics.summary import ArmResult, Summary, summarize

__all__ = [
    "ArmResult",
    "Budget",
    "Point",
    "Record",
    "Seconds",
    "Summary",
    "steps_to_target",
    "summarize",
]
