"""How devices, or cores, share the work: each has runs of its own, or a part of every batch.

Engines write programs of keys `[seeds]`, swept numbers `[points]`, states and orders `[points,
seeds, ...]`, and of arguments that all runs have in common. A layout compiles them and puts
the arguments where they belong; `kinds` has, for each argument, which of these it is:

    run, seed, point    as above
    all                 in common
    order               the examples of some steps, `[points, seeds, batch, steps]`
    rows                examples of a split, `[n]`
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax.errors import UserError
from bn_jax.training.parallel import MODES, batch_mesh, divide, over_devices, put, replicate

# Past the end of every split.
NONE = jnp.iinfo(jnp.int32).max
PARALLEL = ("auto", "single", "cores", "grid", *MODES)


class Single:
    """One device.

    Attributes:
      block: into how many parts the points and the seeds are divided.
      parts: into how many the examples of a batch are.
      sharers: parts of the block that share the memory of one device.
    """

    block = (1, 1)
    parts = 1
    sharers = 1

    def program(
        self, f: Callable, kinds: Sequence[str], donate: Sequence[int] = (), out: str = "run"
    ) -> Any:
        """f, to be lowered; given `axis_name` where examples are divided over one."""
        return jax.jit(f, donate_argnums=tuple(donate))

    def put(self, tree: Any, kind: str) -> Any:
        """An argument where the program takes it."""
        return tree

    def wait(self, tree: Any) -> None:
        """Waits where the next program must not be queued yet."""

    def whole(self, f: Callable[[Any], Any], tree: Any) -> Any:
        """f of a state or result of runs: of all runs in arrays `[points, seeds, ...]`."""
        return f(tree)

    def own(self, state: Any, i: int, j: int) -> Any:
        """A copy of the state of one run, on the first device."""
        return jax.tree.map(lambda v: v[i, j], state)


def _block(n, points, seeds):
    """n as parts of the points and of the seeds, so that none has more runs than it must."""
    shapes = [(n // b, b) for b in range(n, 0, -1) if n % b == 0]
    # Of equals the one with most parts of the seeds: a device shuffles once for a seed.
    return min(shapes, key=lambda s: -(-points // s[0]) * -(-seeds // s[1]))


class Cores(Single):
    """A CPU's cores with runs of their own: a rectangle of the grid for each, in a thread.

    XLA's own threads share out what one operation does. Products of batches of tens are too
    small for that: of the paper's MNIST network one core trains nearly as many runs as two
    (`benchmarks.mlp_steps`). What is of a run, a seed or a point is a list here, of one part
    for each core.
    """

    def __init__(self, points: int, seeds: int):
        self.block = _block(min(cores(), points * seeds), points, seeds)
        self.sharers = math.prod(self.block)
        # As many again for the order of the data, which is computed beside the steps.
        self._pool = ThreadPoolExecutor(2 * self.sharers)

    def program(self, f, kinds, donate=(), out="run"):
        # What is of a seed is the same for all points.
        copies = self.block[0] if out == "seed" else 1
        return _InThreads(jax.jit(f, donate_argnums=tuple(donate)), self._pool, copies)

    def put(self, tree, kind):
        if kind not in ("seed", "point"):
            return tree
        return [self._part(tree, i, j, kind) for i, j in np.ndindex(self.block)]

    def _part(self, tree, i, j, kind):
        at, of = (i, self.block[0]) if kind == "point" else (j, self.block[1])

        def part(v):
            size = v.shape[0] // of
            return v[at * size : (at + 1) * size]

        return jax.tree.map(part, tree)

    def whole(self, f, tree):
        def joined(*parts):
            high, wide = self.block
            rows = [parts[i * wide : (i + 1) * wide] for i in range(high)]
            return np.block([[np.asarray(v) for v in row] for row in rows])

        return jax.tree.map(joined, *map(f, tree))

    def own(self, state, i, j):
        high, wide = jax.tree.leaves(state[0])[0].shape[:2]
        part = state[i // high * self.block[1] + j // wide]
        return super().own(part, i % high, j % wide)


class _InThreads:
    """A program that is called once for every part, each in a thread of its own.

    Of parts that are `copies` of others the first are computed, and stand for all.
    """

    def __init__(self, program: Any, pool: ThreadPoolExecutor, copies: int):
        self._program, self._pool, self._copies = program, pool, copies

    def __getattr__(self, name):
        return getattr(self._program, name)

    def lower(self, *args):
        first = [arg[0] if isinstance(arg, list) else arg for arg in args]
        return _InThreads(self._program.lower(*first), self._pool, self._copies)

    def compile(self, options=None):
        return _InThreads(self._program.compile(options), self._pool, self._copies)

    def __call__(self, *args):
        parts = max(len(arg) for arg in args if isinstance(arg, list))
        columns = (a if isinstance(a, list) else itertools.repeat(a, parts) for a in args)
        first, *rows = list(zip(*columns, strict=True))[: parts // self._copies]
        called = [self._pool.submit(self._waited, *row) for row in rows]
        results = [self._waited(*first), *(future.result() for future in called)]
        return results * self._copies

    def _waited(self, *args):
        return jax.block_until_ready(self._program(*args))


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


SPECS = {
    "run": P("points", "seeds"), "order": P("points", "seeds"), "seed": P("seeds"),
    "point": P("points"), "all": P(), "rows": P(),
}  # fmt: skip


class Grid(Single):
    """Devices with runs of their own: a rectangle of the grid for each."""

    def __init__(self, points: int, seeds: int):
        self.block = _block(jax.device_count(), points, seeds)
        axes = (AxisType.Auto, AxisType.Auto)
        self._mesh = jax.make_mesh(self.block, ("points", "seeds"), axis_types=axes)

    def program(self, f, kinds, donate=(), out="run"):
        specs, out = tuple(SPECS[k] for k in kinds), SPECS[out]
        # Nothing is exchanged, and every constant in f would have to be marked as varying.
        g = jax.shard_map(f, mesh=self._mesh, in_specs=specs, out_specs=out, check_vma=False)
        shardings = tuple(NamedSharding(self._mesh, s) for s in specs)
        return jax.jit(g, in_shardings=shardings, donate_argnums=tuple(donate))

    def put(self, tree, kind):
        return put(tree, NamedSharding(self._mesh, SPECS[kind]))

    def own(self, state, i, j):
        everywhere = NamedSharding(self._mesh, P())
        pick = jax.jit(lambda s: jax.tree.map(lambda v: v[i, j], s), out_shardings=everywhere)
        return jax.tree.map(lambda v: v.addressable_data(0), pick(state))


class Batch(Single):
    """Devices with a part of every batch."""

    def __init__(self, mode: str):
        self._mode, self._mesh = mode, batch_mesh()
        self.parts = self._mesh.size

    def program(self, f, kinds, donate=(), out="run"):
        divided = [kind in ("order", "rows") for kind in kinds]
        if any(divided):
            return over_devices(f, self._mode, self._mesh, divided, donate)
        return jax.jit(f, out_shardings=NamedSharding(self._mesh, P()))

    def put(self, tree, kind):
        if kind not in ("order", "rows"):
            return replicate(tree, self._mesh)
        rows = tree[0, 0] if kind == "order" else tree
        missing = -len(rows) % self.parts
        rows = jnp.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)], constant_values=NONE)
        return divide(rows, self._mesh)

    def wait(self, tree):
        # On CPU programs with collectives that are queued end up waiting for each other.
        if self.parts > 1 and jax.default_backend() == "cpu":
            jax.block_until_ready(tree)

    def own(self, state, i, j):
        return jax.tree.map(lambda v: jnp.copy(v.addressable_data(0)[i, j]), state)


def automatic(runs: int, devices: int, processes: int = 1) -> str:
    """The grid if there is a run for every device, else all devices for each run."""
    if devices == 1:
        return "single"
    if runs >= devices:
        return "grid"
    return "pmap" if processes == 1 else "shard_map"


def layout(parallel: str, points: int, seeds: int) -> Single:
    """That of a flag `--parallel`, for a grid of points x seeds.

    Raises:
      UserError: the flag is unknown; pmap, single or cores in several processes; cores where
        JAX computes on something else.
    """
    if parallel not in PARALLEL:
        raise UserError(f"--parallel={parallel}: choose from {', '.join(PARALLEL)}")
    if parallel == "auto":
        parallel = automatic(points * seeds, jax.device_count(), jax.process_count())
    if jax.process_count() > 1 and parallel in ("pmap", "single", "cores"):
        # pmap takes the arrays of one process, and keys of a run are no such arrays.
        raise UserError(
            f"--parallel={parallel} is for one process: choose shard_map, jit or grid"
        )
    if parallel == "single":
        return Single()
    if parallel == "cores":
        if jax.default_backend() != "cpu":
            raise UserError("--parallel=cores is for a CPU: choose auto, or JAX_PLATFORMS=cpu")
        return Cores(points, seeds)
    return Grid(points, seeds) if parallel == "grid" else Batch(parallel)
