"""A copy and the BatchNorm layer for `benchmarks.gpu`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import contestants, layer
from benchmarks.contestants import BOTH, BOTH_WITH_RELU, Task
from benchmarks.gpu_timer import Make, Row, Timer
from bn_jax.errors import UserError

OURS, FLAX = "bn_jax", "flax fast"
FLOAT = 4  # bytes

Arrays = Callable[[], tuple[jax.Array, jax.Array]]


def copies(sizes: Iterable[float], timed: Timer, calls: int) -> list[Row]:
    """A row for each array of so many GiB: `bytes`, and `bandwidth` in bytes/s.

    It is read and written: twice its bytes.
    """
    rows = []
    for gib in sizes:
        n = int(gib * 2**30) // FLOAT
        timing = timed({"copy": functools.partial(copy, n)}, calls)["copy"]
        bandwidth = timing["seconds"] and 2 * FLOAT * n / timing["seconds"]
        rows.append({"bytes": FLOAT * n, **timing, "bandwidth": bandwidth})
    return rows


def copy(n: int) -> Callable[[], jax.Array]:
    """Of so many float32; 1 is added."""
    x, one = jnp.arange(n, dtype=jnp.float32), jnp.ones(())
    return functools.partial(jax.jit(jnp.add), x, one)


def layers(
    shape: str, dtype: str, bandwidth: float | None, timed: Timer, calls: int
) -> list[Row]:
    """A row for each task and layer, of one array.

    `share` is that of the bandwidth which the task's passes over the array come to; None
    where one of the two is not known.
    """
    arrays = functools.cache(functools.partial(random_arrays, shape, dtype))
    size = math.prod(layer.sizes(shape)) * jnp.dtype(dtype).itemsize
    rows = []
    for task in (BOTH, BOTH_WITH_RELU):
        row = {"shape": shape, "dtype": dtype, "task": task.name}
        for name, timing in timed(makers(task, arrays), calls).items():
            seconds = timing["seconds"]
            share = task.passes * size / seconds / bandwidth if seconds and bandwidth else None
            rows.append({**row, "layer": name, **timing, "share": share})
    return rows


def random_arrays(shape: str, dtype: str) -> tuple[jax.Array, jax.Array]:
    """x and dy."""
    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.random.normal(key, layer.sizes(shape)).astype(dtype) for key in keys)
    return x, dy


def makers(task: Task, arrays: Arrays) -> dict[str, Make]:
    """Of our layer, Flax's and torch's.

    torch is asked for no sooner than its own turn: where it has no CUDA, or cannot be
    imported, that costs its row alone.
    """

    def of_jax(name):
        x, dy = arrays()
        apply = contestants.layers(task, x.dtype)[name]
        both = jax.jit(functools.partial(contestants.forward_backward, apply))
        return functools.partial(both, *contestants.initial(x.shape[-1]), x, dy)

    found = {name: functools.partial(of_jax, name) for name in (OURS, FLAX)}
    return found | {"torch": lambda: on_gpu(task, *arrays())}


@dataclasses.dataclass(frozen=True)
class Queued:
    """What torch has started on a GPU; `jax.block_until_ready` waits for it."""

    result: Any
    block_until_ready: Callable[[], None]


def on_gpu(task: Task, x: jax.Array, dy: jax.Array) -> Callable[[], Queued]:
    """torch's layer with CUDA.

    Raises:
      UserError: it has none, or JAX has not.
    """
    if not contestants.has_cuda_torch():
        raise UserError("no torch with CUDA beside JAX on a GPU")
    torch = contestants.import_torch()
    call = contestants.torch_layer(task, x, dy, "cuda")
    return lambda: Queued(call(), torch.cuda.synchronize)
