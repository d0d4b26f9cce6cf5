"""How devices share the work: each has runs of its own, or a part of every batch.

Engines write programs of keys `[seeds]`, swept numbers `[points]`, states and orders `[points,
seeds, ...]`, and of arguments that all runs have in common. A layout compiles them and puts
the arguments where they belong; `kinds` has, for each argument, which of these it is:

    run, seed, point    as above
    all                 in common
    order               the examples of some steps, `[points, seeds, batch, steps]`
    rows                examples of a split, `[n]`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax.errors import UserError
from bn_jax.lab.statistics.records import Budget
from bn_jax.lab.sweeps.grid import Chunk
from bn_jax.lab.sweeps.threaded import ThreadedRuns
from bn_jax.lab.training.parallel import MODES, batch_mesh, divide, over_devices, put, replicate

# Past the end of every split.
NONE = jnp.iinfo(jnp.int32).max
PARALLEL = ("auto", "single", "cores", "grid", *MODES)


class Single:
    """One device.

    Attributes:
      block: into how many parts the points and the seeds are divided.
      parts: into how many the examples of a batch are.
    """

    block = (1, 1)
    parts = 1

    def engine(self, make: type, run: Any, dataset: Any, budget: Budget, example: Chunk) -> Any:
        """One of `bn_jax.lab.sweeps.engines`, for chunks like the example."""
        return make(run, dataset, budget, self, example)

    def at_once(self, make: type, limit: int) -> int:
        """Runs of a device's part of a chunk, of the `limit` that its memory has room for."""
        return make.limit or limit

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

    def own(self, state: Any, i: int, j: int) -> Any:
        """A copy of the state of one run, on the first device."""
        return jax.tree.map(lambda v: v[i, j], state)


SPECS = {
    "run": P("points", "seeds"), "order": P("points", "seeds"), "seed": P("seeds"),
    "point": P("points"), "all": P(), "rows": P(),
}  # fmt: skip


class Cores(Single):
    """A CPU's cores: each trains one run at a time (`bn_jax.lab.sweeps.threaded`)."""

    def engine(self, make, run, dataset, budget, example):
        return ThreadedRuns(make, run, dataset, budget, self, example)

    def at_once(self, make, limit):
        return limit


def _block(n, points, seeds):
    """n as parts of the points and of the seeds, so that none has more runs than it must."""
    shapes = [(n // b, b) for b in range(n, 0, -1) if n % b == 0]
    # Of equals the one with most parts of the seeds: a device shuffles once for a seed.
    return min(shapes, key=lambda s: -(-points // s[0]) * -(-seeds // s[1]))


class Grid(Single):
    """Devices with runs of their own: a rectangle of the grid for each."""

    def __init__(self, points: int, seeds: int):
        self.block = _block(jax.device_count(), points, seeds)
        axes = (AxisType.Auto, AxisType.Auto)
        self._mesh = jax.make_mesh(self.block, ("points", "seeds"), axis_types=axes)
        everywhere = NamedSharding(self._mesh, P())
        # Of numbers that are traced: compiled once, and not for every run.
        self._pick = jax.jit(super().own, out_shardings=everywhere)

    def program(self, f, kinds, donate=(), out="run"):
        specs, out = tuple(SPECS[k] for k in kinds), SPECS[out]
        # Nothing is exchanged, and every constant in f would have to be marked as varying.
        g = jax.shard_map(f, mesh=self._mesh, in_specs=specs, out_specs=out, check_vma=False)
        shardings = tuple(NamedSharding(self._mesh, s) for s in specs)
        return jax.jit(g, in_shardings=shardings, donate_argnums=tuple(donate))

    def put(self, tree, kind):
        return put(tree, NamedSharding(self._mesh, SPECS[kind]))

    def own(self, state, i, j):
        return jax.tree.map(lambda v: v.addressable_data(0), self._pick(state, i, j))


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


def automatic(runs: int, devices: int, processes: int = 1, small: bool = False) -> str:
    """The grid if there is a run for every device, else all devices for each run.

    One CPU trains `small` networks on one core each.
    """
    if devices == 1:
        return "cores" if small and runs > 1 and jax.default_backend() == "cpu" else "single"
    if runs >= devices:
        return "grid"
    return "pmap" if processes == 1 else "shard_map"


def layout(parallel: str, points: int, seeds: int, small: bool = False) -> Single:
    """That of a flag `--parallel`, for a grid of points x seeds.

    `small` networks gain by a core of their own (`bn_jax.lab.sweeps.programs.Traced.small`).

    Raises:
      UserError: the flag is unknown; pmap, single or cores in several processes; cores where
        JAX computes on something else.
    """
    if parallel not in PARALLEL:
        raise UserError(f"--parallel={parallel}: choose from {', '.join(PARALLEL)}")
    if parallel == "auto":
        counts = points * seeds, jax.device_count(), jax.process_count()
        parallel = automatic(*counts, small)
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
        return Cores()
    return Grid(points, seeds) if parallel == "grid" else Batch(parallel)
