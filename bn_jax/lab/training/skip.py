"""A step that went wrong is undone whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def undo_nonfinite(before: Any, after: Any, *values: Any) -> tuple[Any, jax.Array]:
    """The state after a step, or, where a value was not finite, the state before it.

    Parameters and optimizer state are not all that a step changes: by the time that a loss
    or a gradient turns out to be infinite, the running statistics have taken the batch in.

    Args:
      before, after: states of one structure: parameters, optimizer state, `batch_stats`.
      *values: what has to be finite: loss, gradients; trees. Over a mapped axis they
        are the same in all replicas, as means over it are: each decides by its own.

    Returns:
      The state, and whether the step was undone, bool `[]`.
    """
    leaves = [v for v in jax.tree.leaves(values) if jnp.issubdtype(v.dtype, jnp.inexact)]
    finite = jnp.array([jnp.isfinite(v).all() for v in leaves]).all()
    return jax.tree.map(lambda old, new: jnp.where(finite, new, old), before, after), ~finite
