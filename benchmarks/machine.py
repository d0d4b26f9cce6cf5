"""The machine that measures: its name, the memory of single layers, the rate of products."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp

from bn_jax.lab.sweeps.timing import interleave
from bn_jax.xla import KEEP_BLOCKS, tell_malloc

M_ARENA_MAX = -8  # malloc.h
MATRIX = 2048  # rows and columns


def describe_machine(*packages: str) -> str:
    """A line: device, cores, versions of Python, JAX and of those packages that are there."""
    versions = [f"Python {platform.python_version()}"]
    for name in ("jax", "jaxlib", *packages):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    file, device = Path("/proc/cpuinfo"), jax.devices()[0]
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    where = f"{device.platform}: {device.device_kind}, {processor}, {os.cpu_count()} cores"
    return f"{where}; {', '.join(versions)}."


def one_heap() -> bool:
    """Makes glibc keep large blocks for the next call; False where that cannot be had.

    They would be mapped anew at each call, and every page faulted in: 12 ms that hide a layer
    of 4 ms, alike for everybody. Unlike with `bn_jax.xla.keep_memory`, XLA computes in threads
    of its own; all share one heap, which slows down small programs only. To be called first.
    """
    return tell_malloc({M_ARENA_MAX: 1} | KEEP_BLOCKS)


def share(flop: float, seconds: dict[str, float]) -> str:
    """Says the FLOP/s of programs of so many FLOP, beside those of a matrix product.

    `seconds` has the time of each program, by name.
    """
    a = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX))
    times = interleave({"product": functools.partial(jax.jit(jnp.dot), a, a)}, 9)["product"]
    most = 2 * MATRIX**3 / statistics.median(times)
    rates = {name: flop / s for name, s in seconds.items()}
    each = (f"{name} {r / 1e9:.0f} GFLOP/s, {r / most:.0%}" for name, r in rates.items())
    return (
        f"A step is {flop / 1e9:.3g} GFLOP: {'; '.join(each)} of the {most / 1e9:.0f} GFLOP/s "
        f"of a product of {MATRIX:,} x {MATRIX:,} float32 matrices.\n"
    )
