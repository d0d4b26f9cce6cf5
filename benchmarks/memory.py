"""The memory that single layers are timed in."""

from __future__ import annotations

import ctypes
import platform

from bn_jax.training.xla import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

M_ARENA_MAX = -8  # malloc.h


def one_heap() -> bool:
    """Makes glibc keep large blocks for the next call; False where that cannot be had.

    They would be mapped anew at each call, and every page faulted in: 12 ms that hide a layer
    of 4 ms, alike for everybody. As `bn_jax.training.xla.keep_memory`, but that XLA computes in
    threads of its own, as by default; all share one heap, which slows small programs down and
    layers of megabytes not. To be called first.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
    return all(mallopt(*setting) for setting in settings.items())
