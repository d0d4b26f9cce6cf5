"""What a training step takes and returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """Parameters, running statistics and optimizer state after `step` steps.

    `batch_stats` is an empty dict for a model without any. `skipped` of the steps came
    to something that was not finite, and changed nothing.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    skipped: jax.Array
