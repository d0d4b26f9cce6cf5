"""Timing, and the memory that large arrays are timed in."""

from __future__ import annotations

import ctypes
import platform

from bn_jax.measure.timing import WARMUP, interleave, median_ratio

__all__ = ["WARMUP", "interleave", "keep_memory", "median_ratio"]

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
