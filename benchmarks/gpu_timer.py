"""Timing on a machine that is lent for minutes: what fails or comes too late takes one row."""

from __future__ import annotations

import dataclasses
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from bn_jax.errors import UserError
from bn_jax.measure.timing import interleave

SKIPPED = "skipped"

Row = dict[str, Any]
Make = Callable[[], Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Timer:
    """Times contestants side by side, while there is time.

    Attributes:
      deadline: of `time.monotonic()`.
      rounds: how often each is timed.
    """

    deadline: float
    rounds: int

    def spent(self) -> bool:
        """Whether nothing more is to start."""
        return time.monotonic() >= self.deadline

    def __call__(self, makers: dict[str, Make], calls: int) -> dict[str, Row]:
        """By name `seconds` of one call, or None; and a `note` of why there are none, or "".

        Args:
          makers: for each contestant, what prepares its call.
          calls: so many are started one after another, and the last one is waited for. On a
            GPU they are queued, and starting them takes no time of its own.
        """
        ready, notes = {}, dict.fromkeys(makers, "")
        for name, make in makers.items():
            try:
                if self.spent():
                    notes[name] = SKIPPED
                else:
                    ready[name] = warm(make(), calls)
            except Exception as e:  # whatever it is, the others are still to be timed
                notes[name] = reason(e)
        rounds = interleave(ready, self.rounds)
        medians = {name: statistics.median(s) / calls for name, s in rounds.items()}
        return {name: {"seconds": medians.get(name), "note": notes[name]} for name in makers}


def warm(call: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """So many calls as one, which is done once: that compiles, and takes the memory."""

    def several():
        for _ in range(calls):
            result = call()
        return result

    jax.block_until_ready(several())
    return several


def reason(error: Exception) -> str:
    """What a table says of it; the traceback of what nobody foresaw is printed."""
    text = f"{type(error).__name__}: {error}"
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error)
    return text.splitlines()[0][:80]
