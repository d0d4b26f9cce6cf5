"""What pays of XLA's settings, in one place: flags, memory, and a cache of programs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path

# Convolutions on CPU through XLA's own code instead of the YNN library: a training step of
# a CIFAR-10 network takes half of the time. A flag that a jaxlib does not know aborts the
# process, hence the range: it is known to be there from 0.10.2 to 0.12.
CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
CONVOLUTION_VALUE = "-individual_convolution"
FIRST, PAST_LAST = (0, 10, 2), (0, 13)

# All of that library, one program at a time, by the name that a compiler option has for it.
LIBRARY_OPTION = CONVOLUTION_FLAG.removeprefix("--")

# Of malloc.h: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
KEEP_BLOCKS = {-1: 2**31 - 1, -3: 1 << 30}
DISPATCH = "jax_cpu_enable_async_dispatch"


def set_up() -> dict[str, str | bool]:
    """`set_flags` and `keep_memory`; what they returned, as `config.json` has it."""
    return {"xla_flags": set_flags(), "memory_kept": keep_memory()}


def set_flags() -> str:
    """Adds the flags to `XLA_FLAGS` where this jaxlib knows them and the user has not.

    To be called before the first JAX computation. Returns `XLA_FLAGS` as it then is.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if _known() and CONVOLUTION_FLAG not in given:
        os.environ["XLA_FLAGS"] = f"{given} {CONVOLUTION_FLAG}={CONVOLUTION_VALUE}".strip()
    return os.environ.get("XLA_FLAGS", "")


def without_library() -> dict[str, str]:
    """Compiler options for programs of small dense layers on CPU: without the YNN library.

    Its sums take several times as long as XLA's own where a vector per run is spread over the
    run's batch (x - mean under vmap): a step of circles' network with BatchNorm, 100 runs at
    once, takes 8 us a run in place of 20. Images are the other way round: there its sums are
    5 to 7 times as fast. Empty where the user has set the flag, or jaxlib may not know it.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    ours = f"{CONVOLUTION_FLAG}={CONVOLUTION_VALUE}"
    users = any(flag.startswith(CONVOLUTION_FLAG) and flag != ours for flag in given)
    return {LIBRARY_OPTION: ""} if _known() and not users else {}


def _known():
    version = importlib.metadata.version("jaxlib").split(".")
    return FIRST <= tuple(int(v) for v in version if v.isdigit()) < PAST_LAST


def keep_memory() -> bool:
    """Lets XLA on CPU take the large blocks of a call from those of the call before.

    By default glibc maps blocks above 32 MiB anew for each call and the kernel clears them page
    by page: a fifth of a training step of CIFAR-10's network A, most of the time of a BatchNorm
    by itself. Told to keep them it does so in the main thread alone, so that is where XLA has
    to run (`jax_cpu_enable_async_dispatch`). Up to 2 GiB that are free stay with the process.

    To be called before the first JAX computation. Returns whether blocks are kept: not where
    there is no glibc, nor where the user has chosen (`MALLOC_*`, `GLIBC_TUNABLES` that name
    malloc, `JAX_CPU_ENABLE_ASYNC_DISPATCH`).
    """
    chosen = "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    chosen |= any(name.startswith(("MALLOC_", DISPATCH.upper())) for name in os.environ)
    kept = not chosen and tell_malloc(KEEP_BLOCKS)
    if kept:
        import jax

        jax.config.update(DISPATCH, False)
    return kept


def tell_malloc(settings: dict[int, int]) -> bool:
    """Whether glibc takes these, by their numbers in malloc.h; False where there is none."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*setting) for setting in settings.items())


def keep_compiled(folder: Path) -> None:
    """Programs that take long to compile are kept there, for the processes that follow.

    Nothing is changed where the user has chosen a folder (`JAX_COMPILATION_CACHE_DIR`, or none
    by `JAX_ENABLE_COMPILATION_CACHE=false`), or where this one cannot be written.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default 1 s. A program of .1 s takes some 10 ms to read.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
