"""Two ways to train a chunk of the grid, with one interface.

`Together`: all runs of a device in one vmapped program that scans over the steps. For dense
networks.
`InTurn`: one run on a device, step by step through one compiled step. For networks with
convolutions on CPU, where XLA runs a convolution within a loop several times slower, and a
vmapped one as a slow grouped convolution; and where all devices train one network.

`engine_class` chooses. Both compile when they are made. `init(chunk)` gives a state,
`advance(state, chunk, first_step)` the state `eval_every` steps later, `evaluate(state,
chunk)` a dict of `[points, seeds]` arrays, `pick(state, i, j)` the state of one run. States
are donated: use each once. Both may be told which runs are `going`, `[points, seeds]`: what
becomes of the others does not count. Where a budget has several laps, `lap(state, chunk,
order, since)` is one of them, on `order(chunk, first_step)`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bn_jax.measure.ahead import Ahead
from bn_jax.measure.grid import Budget, Chunk
from bn_jax.measure.layouts import Single
from bn_jax.measure.programs import Traced
from bn_jax.training.distributed import everyone
from bn_jax.training.run import NO_SUMS, Run, RunState, data_key
from bn_jax.training.xla import run_once, sorts, without_library

RUN = ("run", "seed", "point")


def engine_class(one: Traced, layout: Single) -> type[Together | InTurn]:
    """The faster one for the network and the machine."""
    in_turn = one.convolves and jax.default_backend() == "cpu"
    return InTurn if in_turn or layout.parts > 1 else Together


class _Engine:
    def advance(
        self, state: Any, chunk: Chunk, first_step: int, going: np.ndarray | None = None
    ) -> Any:
        """The state `eval_every` steps later, which is queued and not waited for."""
        return self.lap(state, chunk, self.order(chunk, first_step), 0)

    def pick(self, state: Any, i: int, j: int) -> RunState:
        """A copy of the state of the run of point i and seed j."""
        return self._layout.own(state, i, j)


class Together(_Engine):
    """A chunk of any size at once."""

    limit = None

    def __init__(self, run: Run, dataset: Any, budget: Budget, layout: Single, example: Chunk):
        self._layout, self._budget = layout, budget
        self._dataset = layout.put(dataset, "all")
        runs = example.runs // math.prod(layout.block)  # of a device

        def init(_, key, swept, split):
            return run.init(key, swept, split.inputs)

        def order(key, first_step):
            return run.batches(data_key(key), first_step, budget.eval_every)

        def advance(state, key, swept, order, since, split):
            def step(state, rows):
                return run.step(state, swept, split, rows), None

            rows = lax.dynamic_slice_in_dim(order, since, budget.lap)
            return lax.scan(step, _summing_from_0(state, since), rows)[0]

        def count(state, key, swept, split, rows):
            sums = lax.map(lambda r: run.evaluate(state, swept, split, r), rows)
            return jax.tree.map(jnp.sum, sums)

        def program(f, *more, donate=()):
            return layout.program(_over_grid(f, more), (*RUN, *more), donate)

        inputs, train, zero = _put(layout, example), self._dataset.train, np.int32(0)
        init = layout.program(_one_by_one(init), (*RUN, "all"))
        order = layout.program(jax.vmap(order, (0, None)), ("seed", "all"), out="seed")
        advance = program(advance, "seed", "all", "all", donate=(0,))
        count = program(count, "all", "all")
        options = without_library() if jax.default_backend() == "cpu" else {}
        init, order = init.lower(None, *inputs, train), order.lower(inputs[0], zero)
        state, rows = init.out_info, order.out_info
        self._init, order = init.compile(run_once()), order.compile(options | sorts())
        self._order = Ahead(
            lambda chunk, step: order(layout.put(chunk.keys, "seed"), step),
            budget.eval_every, budget.steps, layout.beside,
        )  # fmt: skip
        self._advance = advance.lower(state, *inputs, rows, zero, train).compile(options)
        self._held_out = [
            (split, layout.put(_rows(split, budget, runs), "all"))
            for split in _held_out(self._dataset)
        ]
        self._count = [
            count.lower(state, *inputs, *held_out).compile(options)
            for held_out in self._held_out
        ]

    def init(self, chunk: Chunk) -> Any:
        """The state of every run before its first step."""
        return self._init(None, *_put(self._layout, chunk), self._dataset.train)

    def order(self, chunk: Chunk, first_step: int) -> jax.Array:
        """The examples of the next `eval_every` steps, int32 `[seeds, steps, batch]`."""
        return self._order(chunk, first_step)

    def lap(self, state: Any, chunk: Chunk, order: jax.Array, since: int) -> Any:
        """The state a lap later, of which the first step is number `since` of the order."""
        inputs, train = _put(self._layout, chunk), self._dataset.train
        return self._advance(state, *inputs, order, np.int32(since), train)

    def training_memory(self) -> int:
        """Bytes that `advance` holds on a device: arguments, results, temporaries."""
        found = self._advance.memory_analysis()
        held = found.argument_size_in_bytes + found.temp_size_in_bytes
        return held + found.output_size_in_bytes - found.alias_size_in_bytes

    def state_memory(self) -> int:
        """Bytes of a state, which `advance` returns in the place of the one before."""
        return self._advance.memory_analysis().alias_size_in_bytes

    def evaluate(
        self, state: Any, chunk: Chunk, going: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Losses, accuracies and `diverged_at`, `[points, seeds]` each."""
        inputs = _put(self._layout, chunk)
        pairs = zip(self._count, self._held_out, strict=True)
        sums = [count(state, *inputs, *held_out) for count, held_out in pairs]
        return _report(state, sums, self._dataset, self._budget)


class InTurn(_Engine):
    """A chunk of one run, or of one on each device."""

    limit = 1

    def __init__(self, run: Run, dataset: Any, budget: Budget, layout: Single, example: Chunk):
        self._layout, self._budget = layout, budget
        self._dataset = layout.put(dataset, "all")

        def init(_, key, swept, split):
            return run.init(key, swept, split.inputs)

        def order(_, key, swept, first_step):
            return run.batches(data_key(key), first_step, budget.eval_every).T

        def step(state, key, swept, split, since, order, axis_name=None):
            rows = order.reshape(order.shape[-2:])[:, since]
            return run.step(
                _summing_from_0(state, since), swept, split, rows,
                filled=fills, axis_name=axis_name,
            )  # fmt: skip

        def count(state, key, swept, split, rows, axis_name=None):
            return run.evaluate(state, swept, split, rows, axis_name=axis_name)

        def program(f, *more, donate=()):
            return layout.program(_of_one(f), (*RUN, *more), donate)

        inputs, train, zero = _put(layout, example), self._dataset.train, np.int32(0)
        init = program(init, "all").lower(None, *inputs, train)
        order = program(order, "all").lower(None, *inputs, zero)
        state, fills = init.out_info, order.out_info.shape[2] % layout.parts > 0
        self._init, self._order = init.compile(run_once()), order.compile(sorts())
        rows = layout.put(self._order(None, *inputs, zero), "order")
        step = program(step, "all", "all", "order", donate=(0,))
        self._step = step.lower(state, *inputs, train, zero, rows).compile()
        self._held_out = [
            (split, [layout.put(r, "rows") for r in _rows(split, budget, 1)])
            for split in _held_out(self._dataset)
        ]
        count = program(count, "all", "rows")
        self._count = [
            count.lower(state, *inputs, split, rows[0]).compile()
            for split, rows in self._held_out
        ]

    def init(self, chunk: Chunk) -> Any:
        """The state of every run before its first step."""
        state = self._init(None, *_put(self._layout, chunk), self._dataset.train)
        return self._layout.put(state, "run")

    def order(self, chunk: Chunk, first_step: int) -> jax.Array:
        """The examples of the next `eval_every` steps, `[points, seeds, batch, steps]`."""
        order = self._order(None, *_put(self._layout, chunk), np.int32(first_step))
        return self._layout.put(order, "order")

    def lap(self, state: Any, chunk: Chunk, order: jax.Array, since: int) -> Any:
        """The state a lap later, of which the first step is number `since` of the order."""
        inputs, train = _put(self._layout, chunk), self._dataset.train
        for i in range(since, since + self._budget.lap):
            state = self._step(state, *inputs, train, np.int32(i), order)
            self._layout.wait(state)
        return state

    def evaluate(
        self, state: Any, chunk: Chunk, going: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Losses, accuracies and `diverged_at`, `[points, seeds]` each."""
        inputs, sums = _put(self._layout, chunk), []
        for count, (split, chunks) in zip(self._count, self._held_out, strict=True):
            parts = []
            for rows in chunks:
                parts.append(count(state, *inputs, split, rows))
                self._layout.wait(parts)
            sums.append(jax.tree.map(lambda *v: sum(v), *parts))
        return _report(state, sums, self._dataset, self._budget)


def _summing_from_0(state, since):
    """Before the step that comes `since` steps after an evaluation, where the sums begin."""
    sums = jax.tree.map(lambda v, none: jnp.where(since == 0, none, v), state.sums, NO_SUMS)
    return state._replace(sums=sums)


def _put(layout, chunk):
    return layout.put(chunk.keys, "seed"), layout.put(chunk.swept, "point")


def _report(state, sums, dataset, budget):
    sums, diverged_at = everyone(((state.sums, *sums), state.diverged_at))
    counts = (budget.eval_every, *(split.labels.shape[0] for split in _held_out(dataset)))
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


def _held_out(dataset):
    return dataset.validation, dataset.test


def _over_grid(f, more):
    """f of a run, `RUN` and more, over states [points, seeds], keys [seeds], swept [points]."""
    kinds = (*RUN, *more)
    seeds, points = (
        tuple(0 if kind in ("run", axis) else None for kind in kinds)
        for axis in ("seed", "point")
    )
    return jax.vmap(jax.vmap(f, seeds), points)


def _one_by_one(f):
    """As `_over_grid` where there is no state yet: run after run.

    Orthogonal kernels are by QR, of which a batch waits for threads of XLA's pool: two at the
    same time wait for each other, on two cores, for ever (LAPACK in jaxlib 0.10.2).
    """

    def g(_, keys, swept, *rest):
        return lax.map(lambda s: lax.map(lambda key: f(None, key, s, *rest), keys), swept)

    return g


def _of_one(f):
    """As `_over_grid`, where there is one point and one seed: f without vmap."""

    def g(state, key, swept, *rest, **names):
        state = jax.tree.map(lambda v: v[0, 0], state)
        result = f(state, key[0], jax.tree.map(lambda v: v[0], swept), *rest, **names)
        return jax.tree.map(lambda v: v[None, None], result)

    return g
