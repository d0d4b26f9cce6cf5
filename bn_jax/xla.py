"""What pays of XLA's settings, in one place: flags, compiler options, memory, a cache.

Flags are for the whole process, compiler options for one program, where they win over flags:
so none is given whose flag the user has set.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# Convolutions on CPU through XLA's own code instead of the YNN library: a training step of
# a CIFAR-10 network takes half of the time. A flag that a jaxlib does not know aborts the
# process, an option ends in an error, hence the range: all are there from 0.10.2 to 0.12.
CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
CONVOLUTION_VALUE = "-individual_convolution"
FIRST, PAST_LAST = (0, 10, 2), (0, 13)

# As compiler options have it, and how much of LLVM's work is done: 3 by default.
LIBRARY_OPTION = CONVOLUTION_FLAG.removeprefix("--")
LEVEL_OPTION = "xla_backend_optimization_level"

# Of malloc.h: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
KEEP_BLOCKS = {-1: 2**31 - 1, -3: 1 << 30}
DISPATCH = "jax_cpu_enable_async_dispatch"

# Compilation in seconds from which a program is kept: JAX's own, and ours. A program of .1 s
# takes some 10 ms to read.
THRESHOLD, JAXS_SECONDS, SECONDS = "jax_persistent_cache_min_compile_time_secs", 1.0, 0.1


def set_up() -> dict[str, Any]:
    """`set_flags` and `keep_memory`; what applies since, as `config.json` has it."""
    flags, kept = set_flags(), keep_memory()
    return {"xla_flags": flags, "compiler_options": compiler_options(), "memory_kept": kept}


def set_flags() -> str:
    """Adds the flags to `XLA_FLAGS` where this jaxlib knows them and the user has not.

    To be called before the first JAX computation. Returns `XLA_FLAGS` as it then is. It may
    also name a file of flags, to which XLA lets nothing be added: then it stays as it is.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if _known() and not _in_file(given) and not _users(CONVOLUTION_FLAG):
        os.environ["XLA_FLAGS"] = f"{given} {CONVOLUTION_FLAG}={CONVOLUTION_VALUE}".strip()
    return os.environ.get("XLA_FLAGS", "")


def compiler_options() -> dict[str, dict[str, Any]]:
    """The options below, by the kind of programs that have them."""
    return {
        "run_once": run_once(), "sorts": sorts(), "dense_sweeps_on_cpu": without_library()
    }  # fmt: skip


def run_once() -> dict[str, int]:
    """For programs that take longer to compile than to run: not optimised.

    To initialise weights, say, takes milliseconds, and to optimise seconds, as Threefry is
    unrolled for every kernel.
    """
    return _level(0)


def sorts() -> dict[str, int]:
    """For programs that sort most of the time, by what XLA has compiled: optimised a little."""
    return _level(1)


def without_library() -> dict[str, str]:
    """For sweeps of small dense layers on CPU: without the YNN library.

    Its sums take several times as long as XLA's own where a vector per run is spread over the
    run's batch (x - mean under vmap): `benchmarks.tricks` trains circles' network with and
    without it. Images are the other way round: there its sums are the fast ones.
    """
    ours = f"{CONVOLUTION_FLAG}={CONVOLUTION_VALUE}"
    return {LIBRARY_OPTION: ""} if _known() and not _users(CONVOLUTION_FLAG, ours) else {}


def _level(level):
    return {LEVEL_OPTION: level} if _known() and not _users(f"--{LEVEL_OPTION}") else {}


def _users(name, ours=None):
    """Whether XLA_FLAGS has the flag, but for `ours`, which `set_flags` may have added."""
    given = os.environ.get("XLA_FLAGS", "")
    if _in_file(given):
        try:
            given = Path(given).read_text()
        except OSError:  # of which XLA itself complains, and ends
            return False
    return any(flag.split("=")[0] == name and flag != ours for flag in given.split())


def _in_file(given):
    """Whether XLA takes it for the name of a file, as it does not begin as a flag."""
    return bool(given.strip()) and not given.lstrip().startswith("-")


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

    Nothing is changed where the user has chosen a folder (`JAX_COMPILATION_CACHE_DIR`) or none
    (`JAX_ENABLE_COMPILATION_CACHE=false`), or where this one cannot be written. What takes
    long is .1 s, unless the user has chosen (`JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`).
    """
    import jax

    chosen = jax.config.values["jax_compilation_cache_dir"] is not None
    if chosen or not jax.config.values["jax_enable_compilation_cache"]:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if THRESHOLD.upper() not in os.environ and getattr(jax.config, THRESHOLD) == JAXS_SECONDS:
        jax.config.update(THRESHOLD, SECONDS)
