"""Numbers that a caller gives, refused where they are known to make no sense.

Of a traced number only the kind and the shape are known.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from bn_jax.core.arrays import shape_of

LARGEST = float(jnp.finfo(jnp.float64).max)


def check_number(
    name: str,
    v: Any,
    low: float,
    high: float = math.inf,
    *,
    wanted: str,
    features: tuple[int, ...] | None = None,
) -> None:
    """Raises unless v is a real number, or an array of them, from low to high.

    Args:
      name, v: an argument.
      low, high: both are allowed; NaN never is.
      wanted: what v should be, for the message.
      features: v is of shape `[]` or of this one; otherwise of any.

    Raises:
      TypeError: v is no real number. True and False are none.
      ValueError: another value, or another shape.
    """
    dtype = getattr(v, "dtype", None)
    if dtype is None:
        real = isinstance(v, int | float) and not isinstance(v, bool)
    else:
        real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not real:
        raise TypeError(f"{name}={' '.join(repr(v).split())}: {wanted}")
    if features is not None and shape_of(v) not in ((), features):
        raise ValueError(f"{name} of shape {shape_of(v)}: {wanted}, or one for each feature")
    if isinstance(v, Tracer) or not getattr(v, "is_fully_addressable", True):
        return
    known = jax.device_get(v)
    smallest, largest = known, known
    if dtype is not None:  # of Python, which compares with any number
        smallest, largest = known.min().item(), known.max().item()
    if not (low <= smallest and largest <= high):
        raise ValueError(f"{name}={smallest if not low <= smallest else largest}: {wanted}")


def check_momentum(momentum: Any, *, features: tuple[int, ...] | None = None) -> None:
    """Raises, as `check_number`, unless it is the weight of an old value."""
    wanted = "a number from 0 to 1 (None goes with cumulative_mean)"
    check_number("momentum", momentum, 0, 1, wanted=wanted, features=features)


def check_epsilon(epsilon: Any) -> None:
    """Raises, as `check_number`, unless it can be added to a variance."""
    check_number("epsilon", epsilon, 0, LARGEST, wanted="a finite number of at least 0")
