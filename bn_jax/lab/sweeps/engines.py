"""Two ways to train a chunk of the grid, with one interface.

`VmappedSweep`: all runs of a device in one vmapped program that scans over the steps. For dense
networks.
`StepwiseSweep`: one run on a device, step by step through one compiled step. For networks with
convolutions on CPU, where XLA runs a convolution within a loop several times slower, and a
vmapped one as a slow grouped convolution; and where all devices train one network.

`engine_class` chooses. Both compile when they are made. `init(chunk)` gives a state,
`advance(state, chunk, first_step)` the state `eval_every` steps later, `evaluate(state,
chunk)` a dict of `[points, seeds]` arrays, `pick(state, i, j)` the state of one run. States
are donated: use each once. Both may be told which runs are `going`, `[points, seeds]`: what
becomes of the others does not count. Where a budget has several laps, `lap(state, chunk,
order, since)` is one of them, on `order(chunk, first_step)`. `training_memory()` and
`state_memory()` are bytes on a device. `prepare` makes one for all of a grid at once.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.stages import Compiled

from bn_jax.lab.data.dataset import Dataset, Split
from bn_jax.lab.statistics.records import Budget, Point
from bn_jax.lab.sweeps import layouts
from bn_jax.lab.sweeps.grid import Chunk, chunks
from bn_jax.lab.sweeps.programs import Traced, traced
from bn_jax.lab.sweeps.threaded import ThreadedRuns
from bn_jax.lab.training.distributed import everyone
from bn_jax.lab.training.run import NO_SUMS, Run, RunState, Swept, data_key
from bn_jax.xla import run_once, sorts, without_library


def engine_class(one: Traced, layout: layouts.Single) -> type[Engine]:
    """The faster one for the network and the machine."""
    in_turn = one.convolves and jax.default_backend() == "cpu"
    return StepwiseSweep if in_turn or layout.parts > 1 else VmappedSweep


def prepare(
    run: Run, dataset: Dataset, points: Sequence[Point], seeds: Sequence[int], budget: Budget,
    parallel: str, make: type[Engine] | None = None,
) -> tuple[Engine | ThreadedRuns, Chunk]:  # fmt: skip
    """An engine for the whole grid, and the grid as the chunk that it takes.

    Args:
      run, dataset, points, seeds, budget, parallel: as for `bn_jax.lab.sweeps.sweep`.
      make: the engine; by default that of a sweep.

    Raises:
      ValueError: the grid is more than the engine takes at once.
    """
    one = traced(run, dataset)
    layout = layouts.layout(parallel, len(points), len(seeds), one.small(budget.eval_every))
    make = make or engine_class(one, layout)
    limit = layout.at_once(make, len(points) * len(seeds))
    (chunk,) = chunks(points, seeds, limit, layout.block)
    return layout.engine(make, run, dataset, budget, chunk), chunk


class Engine(abc.ABC):
    """What both do with the programs that they make.

    These are `_init`, `_order`, `_train` for a lap or a step, and in `_counts` one for each
    split, with the split and its rows.
    """

    limit: int | None = None
    _init: Compiled
    _order: Compiled
    _train: Compiled
    _counts: list[tuple[Compiled, Split, Any]]

    @abc.abstractmethod
    def order(self, chunk: Chunk, first_step: int) -> jax.Array:
        """The examples of the next `eval_every` steps."""

    @abc.abstractmethod
    def lap(self, state: Any, chunk: Chunk, order: jax.Array, since: int) -> Any:
        """The state a lap later, of which the first step is number `since` of the order."""

    @abc.abstractmethod
    def _sum(self, count: Compiled, state: Any, swept: Swept, split: Split, rows: Any) -> Any:
        """What `count` sums over all rows of the split."""

    def __init__(self, dataset: Dataset, budget: Budget, layout: layouts.Single):
        self._layout, self._budget = layout, budget
        self._dataset = layout.put(dataset, "all")
        self._held_out = self._dataset.validation, self._dataset.test

    def init(self, chunk: Chunk) -> Any:
        """The state of every run before its first step."""
        inputs = self._dataset.train.inputs
        return self._init(self._keys(chunk), self._swept(chunk), inputs)

    def advance(
        self, state: Any, chunk: Chunk, first_step: int, going: np.ndarray | None = None
    ) -> Any:
        """The state `eval_every` steps later, which is queued and not waited for."""
        return self.lap(state, chunk, self.order(chunk, first_step), 0)

    def evaluate(
        self, state: Any, chunk: Chunk, going: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Losses, accuracies and `diverged_at`, `[points, seeds]` each."""
        swept = self._swept(chunk)
        sums = [self._sum(count, state, swept, *of) for count, *of in self._counts]
        examples = (split.labels.shape[0] for split in self._held_out)
        return _report(state, sums, (self._budget.eval_every, *examples))

    def pick(self, state: Any, i: int, j: int) -> RunState:
        """A copy of the state of the run of point i and seed j."""
        return self._layout.own(state, i, j)

    def training_memory(self) -> int:
        """Bytes that training holds on a device: arguments, results, temporaries."""
        found = self._memory()
        held = found.argument_size_in_bytes + found.temp_size_in_bytes
        return held + found.output_size_in_bytes - found.alias_size_in_bytes

    def state_memory(self) -> int:
        """Bytes of a state, which training returns in the place of the one before."""
        return self._memory().alias_size_in_bytes

    def _memory(self):
        found = self._train.memory_analysis()
        if found is None:
            raise ValueError(f"{jax.default_backend()} does not tell what its programs hold")
        return found

    def _keys(self, chunk):
        return self._layout.put(chunk.keys, "seed")

    def _swept(self, chunk):
        return self._layout.put(chunk.swept, "point")


class VmappedSweep(Engine):
    """A chunk of any size at once."""

    def __init__(
        self, run: Run, dataset: Dataset, budget: Budget, layout: layouts.Single, example: Chunk
    ):
        super().__init__(dataset, budget, layout)
        keys, swept = self._keys(example), self._swept(example)
        train, zero = self._dataset.train, np.int32(0)
        options = without_library() if jax.default_backend() == "cpu" else {}

        runs = example.runs // math.prod(layout.block)  # of a device
        # Under vmap a condition is none: both of its branches are computed.
        over = _of_one if runs == 1 else _over_grid

        def program(f, *kinds, donate=()):
            return layout.program(over(f, kinds), kinds, donate)

        init = layout.program(_one_by_one(run.init), ("seed", "point", "all"))
        init = init.lower(keys, swept, train.inputs)
        order = jax.vmap(functools.partial(_order, run, budget), (0, None))
        order = layout.program(order, ("seed", "all"), out="seed").lower(keys, zero)
        state, shuffle = init.out_info, order.compile(options | sorts())
        self._init = init.compile(run_once())
        self._order = shuffle
        lap = functools.partial(_lap, run, budget)
        lap = program(lap, "run", "point", "all", "all", "seed", donate=(0,))
        self._train = lap.lower(state, swept, train, zero, order.out_info).compile(options)
        count = program(functools.partial(_sums, run), "run", "point", "all", "all")
        self._counts = []
        for split in self._held_out:
            rows = layout.put(_rows(split, budget, runs), "all")
            compiled = count.lower(state, swept, split, rows).compile(options)
            self._counts.append((compiled, split, rows))

    def order(self, chunk: Chunk, first_step: int) -> jax.Array:
        """The examples of the next `eval_every` steps, int32 `[seeds, steps, batch]`."""
        return self._order(self._keys(chunk), np.int32(first_step))

    def lap(self, state: Any, chunk: Chunk, order: jax.Array, since: int) -> Any:
        """The state a lap later, of which the first step is number `since` of the order."""
        swept, train = self._swept(chunk), self._dataset.train
        return self._train(state, swept, train, np.int32(since), order)

    def _sum(self, count, state, swept, split, rows):
        return count(state, swept, split, rows)


class StepwiseSweep(Engine):
    """A chunk of one run, or of one on each device."""

    limit = 1

    def __init__(
        self, run: Run, dataset: Dataset, budget: Budget, layout: layouts.Single, example: Chunk
    ):
        super().__init__(dataset, budget, layout)
        keys, swept = self._keys(example), self._swept(example)
        train, zero = self._dataset.train, np.int32(0)

        def program(f, *kinds, donate=()):
            return layout.program(_of_one(f, kinds), kinds, donate)

        init = program(run.init, "seed", "point", "all").lower(keys, swept, train.inputs)
        order = program(lambda *args: _order(run, budget, *args).T, "seed", "all")
        order = order.lower(keys, zero)
        state, fills = init.out_info, order.out_info.shape[2] % layout.parts > 0
        self._init, self._order = init.compile(run_once()), order.compile(sorts())
        step = functools.partial(_step, run, fills)
        step = program(step, "run", "point", "all", "all", "order", donate=(0,))
        order = self.order(example, 0)
        self._train = step.lower(state, swept, train, zero, order).compile()
        count = program(run.evaluate, "run", "point", "all", "rows")
        self._counts = []
        for split in self._held_out:
            rows = [layout.put(r, "rows") for r in _rows(split, budget, 1)]
            compiled = count.lower(state, swept, split, rows[0]).compile()
            self._counts.append((compiled, split, rows))

    def order(self, chunk: Chunk, first_step: int) -> jax.Array:
        """The examples of the next `eval_every` steps, `[points, seeds, batch, steps]`."""
        order = self._order(self._keys(chunk), np.int32(first_step))
        return self._layout.put(order, "order")

    def lap(self, state: Any, chunk: Chunk, order: jax.Array, since: int) -> Any:
        """The state a lap later, of which the first step is number `since` of the order."""
        swept, train = self._swept(chunk), self._dataset.train
        for i in range(since, since + self._budget.lap):
            state = self._train(state, swept, train, np.int32(i), order)
            self._layout.wait(state)
        return state

    def _sum(self, count, state, swept, split, rows):
        parts = []
        for some in rows:
            parts.append(count(state, swept, split, some))
            self._layout.wait(parts)
        return jax.tree.map(lambda *v: sum(v), *parts)


def _order(run, budget, key, first_step):
    """The examples of the steps to the next evaluation, `[steps, batch]`."""
    return run.batches(data_key(key), first_step, budget.eval_every)


def _lap(run, budget, state, swept, split, since, order):
    def step(state, rows):
        return run.step(state, swept, split, rows), None

    rows = lax.dynamic_slice_in_dim(order, since, budget.lap)
    return lax.scan(step, _summing_from_0(state, since), rows)[0]


def _step(run, filled, state, swept, split, since, order, axis_name=None):
    # A device's part of the batch has no points and seeds in front.
    rows = order.reshape(order.shape[-2:])[:, since]
    return run.step(
        _summing_from_0(state, since), swept, split, rows, filled=filled, axis_name=axis_name
    )


def _sums(run, state, swept, split, rows):
    """Over rows `[n, size]`, of which so many are evaluated at a time."""
    sums = lax.map(lambda r: run.evaluate(state, swept, split, r), rows)
    return jax.tree.map(jnp.sum, sums)


def _summing_from_0(state, since):
    """Before the step that comes `since` steps after an evaluation, where the sums begin."""
    sums = jax.tree.map(lambda v, none: jnp.where(since == 0, none, v), state.sums, NO_SUMS)
    return state._replace(sums=sums)


def _report(state, sums, counts):
    """Means over so many examples, or steps, in training, validation and test."""
    sums, diverged_at = everyone(((state.sums, *sums), state.diverged_at))
    report = {"diverged_at": diverged_at}
    for name, of, count in zip(("train", "validation", "test"), sums, counts, strict=True):
        report[f"{name}_loss"] = of.loss / count
        report[f"{name}_accuracy"] = of.accuracy / count
    return report


def _rows(split, budget, runs):
    """All example numbers in chunks of one size, the last with some past the end."""
    n = split.labels.shape[0]
    # Smaller chunks would make kernels too small, larger ones of images fill the memory.
    count = -(-n // min(max(budget.eval_rows // runs, 32), 1000))
    size = -(-n // count)
    return np.arange(count * size, dtype=np.int32).reshape(count, size)


def _over_grid(f, kinds):
    """f of a run over states [points, seeds], keys [seeds] and swept numbers [points]."""
    seeds, points = (
        tuple(0 if kind in ("run", axis) else None for kind in kinds)
        for axis in ("seed", "point")
    )
    return jax.vmap(jax.vmap(f, seeds), points)


def _one_by_one(init):
    """As `_over_grid`, run after run.

    Orthogonal kernels are by QR, of which a batch waits for threads of XLA's pool: two at the
    same time wait for each other, on two cores, for ever (LAPACK in jaxlib 0.10.2).
    """

    def g(keys, swept, inputs):
        return lax.map(lambda s: lax.map(lambda key: init(key, s, inputs), keys), swept)

    return g


def _of_one(f, kinds):
    """As `_over_grid`, where there is one point and one seed: f without vmap."""
    first = {"run": lambda v: v[0, 0], "seed": lambda v: v[0], "point": lambda v: v[0]}

    def g(*args, **names):
        pairs = zip(args, kinds, strict=True)
        own = (jax.tree.map(first.get(kind, lambda v: v), arg) for arg, kind in pairs)
        return jax.tree.map(lambda v: v[None, None], f(*own, **names))

    return g
