"""Timing what runs side by side in one process."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

WARMUP = 2  # rounds


def interleave(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list]:
    """Seconds of each contestant in each round, after some rounds that do not count.

    Each runs once in every round, in an order drawn anew: in a fixed one each would always
    find the caches as the same neighbour leaves them.
    """
    seconds = {name: [] for name in contestants}
    order = random.Random(0)
    gc.disable()
    try:
        for _ in range(WARMUP + rounds):
            for name in order.sample(list(contestants), len(contestants)):
                start = time.perf_counter()
                result = jax.block_until_ready(contestants[name]())
                seconds[name].append(time.perf_counter() - start)
                del result  # its memory is the next one's
    finally:
        gc.enable()
    return {name: times[WARMUP:] for name, times in seconds.items()}


def median_ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    """The median over the rounds of one contestant's time over another's in that round."""
    pairs = zip(seconds[name], seconds[other], strict=True)
    return statistics.median(a / b for a, b in pairs)
