"""What cannot fit into memory is refused before it begins.

Each estimate is less than what is needed: what might fit is tried.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import jax

from bn_jax.errors import UserError
from bn_jax.lab.fields import Flags
from bn_jax.lab.training.state import TrainState

SERIES = 6  # of a record: loss and accuracy in training, in validation, in the test
NUMBER = 8  # bytes


def check_network(flags: str, state: TrainState, at_once: int = 1) -> None:
    """Raises a UserError if training states and their gradients do not fit.

    Args:
      flags: that decide the size, with their values.
      state: of arrays or `ShapeDtypeStruct`s.
      at_once: how many of them.
    """
    leaves = jax.tree.leaves((state, state.params))
    size = sum(math.prod(v.shape) * v.dtype.itemsize for v in leaves)
    stats = jax.local_devices()[0].memory_stats() or {}
    _check(flags, size * at_once, stats.get("bytes_limit") or _memory())


def check_records(config: Flags, runs: Iterable[tuple[int, int, int]]) -> None:
    """Raises a UserError if what is measured of all the runs does not fit.

    Args:
      config: with its steps and seeds.
      runs: (how many, steps, steps between evaluations) of each kind.
    """
    evaluations = sum(count * (steps // every + 1) for count, steps, every in runs)
    given = (f"--{name}={getattr(config, name)}" for name in ("steps", "eval_every", "seeds"))
    _check(" ".join(given), evaluations * SERIES * NUMBER, _memory())


def check_batch(flags: str, shape: tuple[int, ...]) -> None:
    """Raises a UserError if a batch of bytes of this shape does not fit."""
    _check(flags, math.prod(shape), _memory())


def _check(flags, needed, memory):
    if needed > memory:
        raise UserError(
            f"{flags}: that takes at least {needed / 2**30:,.0f} GiB of memory, and there are "
            f"{memory / 2**30:,.0f}: choose less"
        )


def _memory():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
