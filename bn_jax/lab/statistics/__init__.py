"""Statistics over the records of runs."""

from bn_jax.lab.statistics.convergence import steps_to_target
from bn_jax.lab.statistics.summary import summarize

__all__ = ["steps_to_target", "summarize"]
