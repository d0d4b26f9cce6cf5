"""The memory that single layers are timed in."""

from __future__ import annotations

from bn_jax.xla import KEEP_BLOCKS, tell_malloc

M_ARENA_MAX = -8  # malloc.h


def one_heap() -> bool:
    """Makes glibc keep large blocks for the next call; False where that cannot be had.

    They would be mapped anew at each call, and every page faulted in: 12 ms that hide a layer
    of 4 ms, alike for everybody. As `keep_memory` of `bn_jax.lab`, but that XLA computes in
    threads of its own, as by default; all share one heap, which slows small programs down and
    layers of megabytes not. To be called first.
    """
    return tell_malloc({M_ARENA_MAX: 1} | KEEP_BLOCKS)
