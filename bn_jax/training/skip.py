"""A step that went wrong is undone whole."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def skip_nonfinite(
    before: Any, after: Any, *values: Any, axis_name: Hashable | None = None
) -> tuple[Any, jax.Array]:
    """The state after a step, or, where a value was not finite, the state before it.

    Parameters and optimizer state are not all that a step changes: by the time that a loss
    or a gradient turns out to be infinite, the running statistics have taken the batch in.

    Args:
      before, after: states of one structure: parameters, optimizer state, `batch_stats`.
      *values: what has to be finite: loss, gradients; trees.
      axis_name: mapped axis over which the replicas decide together. Without it each
        decides by its own values, which after a `pmean` of the gradients agree.

    Returns:
      The state, and whether the step was skipped, bool `[]`.
    """
    leaves = [v for v in jax.tree.leaves(values) if jnp.issubdtype(v.dtype, jnp.inexact)]
    finite = jnp.array([jnp.isfinite(v).all() for v in leaves]).all()
    if axis_name is not None:
        finite = lax.pmin(finite.astype(jnp.int32), axis_name) > 0
    return jax.tree.map(lambda old, new: jnp.where(finite, new, old), before, after), ~finite
