"""Timing what runs side by side in one process."""

from __future__ import annotations

import ctypes
import gc
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

WARMUP = 2  # rounds
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def keep_memory() -> bool:
    """Makes glibc keep large blocks for the next call; False where that cannot be had.

    By default it maps blocks above 32 MiB anew at each call, and every page is faulted in:
    12 ms that hide a layer of 4 ms, alike for everybody. XLA's threads would do so whatever
    the threshold, as their heaps hold 64 MiB: all use the main one. To be called first.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
    return all(mallopt(*setting) for setting in settings.items())


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
