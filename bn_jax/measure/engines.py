"""Two ways to train a chunk of the grid, with one interface.

`Together`: all runs in one vmapped program that scans over the steps. For dense networks.
`InTurn`: one run, step by step through one compiled step. For networks with convolutions
on CPU, where XLA runs a convolution within a loop some 25 times slower, and a vmapped one
as a slow grouped convolution.

`engine_class` is the one that suits. Both compile when they are made. `init(chunk)` gives a
state, `advance(state, chunk, first_step)` the state `eval_every` steps later,
`evaluate(state, chunk)` a dict of `[points, seeds]` arrays, `pick(state, i, j)` the state of
one run. States are donated: use each once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bn_jax.measure.grid import Budget, Chunk
from bn_jax.measure.programs import convolves
from bn_jax.training.run import NO_SUMS, Run, RunState, data_key

# Threefry unrolled for every kernel: 5.0 s of optimisation for a program that takes 10 ms.
RUN_ONCE = {"xla_backend_optimization_level": 0}


def engine_class(run: Run, dataset: Any) -> type[Together | InTurn]:
    """The faster one for the network and the machine."""
    in_turn = convolves(run, dataset) and jax.default_backend() == "cpu"
    return InTurn if in_turn else Together


class Together:
    """A chunk of any size at once."""

    limit = None

    def __init__(self, run: Run, dataset: Any, budget: Budget, example: Chunk):
        self._dataset = dataset

        def init(_, key, swept, dataset):
            return run.init(key, swept, dataset.train.inputs)

        def advance(state, key, swept, dataset, first_step):
            rows = run.batches(data_key(key), first_step, budget.eval_every)
            state = state._replace(sums=NO_SUMS)

            def step(state, rows):
                return run.step(state, swept, dataset.train, rows), None

            return lax.scan(step, state, rows)[0]

        def evaluate(state, key, swept, dataset):
            def means(split):
                rows = _rows(split, budget, example.runs)
                sums = lax.map(lambda r: run.evaluate(state, swept, split, r), rows)
                return jax.tree.map(jnp.sum, sums)

            sums = means(dataset.validation), means(dataset.test)
            return _report(state, *sums, dataset, budget)

        inputs = (example.keys, example.swept, dataset)
        state = jax.eval_shape(_over_grid(init, 1), None, *inputs)
        self._init = _compile(_over_grid(init, 1), None, *inputs, options=RUN_ONCE)
        self._advance = _compile(_over_grid(advance, 2), state, *inputs, np.int32(0), donate=0)
        self._evaluate = _compile(_over_grid(evaluate, 1), state, *inputs)

    def init(self, chunk: Chunk) -> Any:
        """The state of every run before its first step."""
        return self._init(None, chunk.keys, chunk.swept, self._dataset)

    def advance(self, state: Any, chunk: Chunk, first_step: int) -> Any:
        """The state `eval_every` steps later."""
        inputs = (chunk.keys, chunk.swept, self._dataset)
        return self._advance(state, *inputs, np.int32(first_step))

    def evaluate(self, state: Any, chunk: Chunk) -> dict[str, np.ndarray]:
        """Losses, accuracies and `diverged_at`, `[points, seeds]` each."""
        report = self._evaluate(state, chunk.keys, chunk.swept, self._dataset)
        return jax.tree.map(np.asarray, report)

    def pick(self, state: Any, i: int, j: int) -> RunState:
        """A copy of the state of the run of point i and seed j."""
        return jax.tree.map(lambda v: v[i, j], state)


class InTurn:
    """A chunk of one run."""

    limit = 1

    def __init__(self, run: Run, dataset: Any, budget: Budget, example: Chunk):
        self._dataset, self._budget = dataset, budget
        key, swept = _only(example)

        def init(key, swept, split):
            return run.init(key, swept, split.inputs)

        def order(key, first_step):
            return run.batches(data_key(key), first_step, budget.eval_every)

        def step(state, swept, split, order, i):
            sums = jax.tree.map(lambda v: jnp.where(i == 0, 0, v), state.sums)
            state = state._replace(sums=sums)
            return run.step(state, swept, split, order[i])

        train = dataset.train
        state = jax.eval_shape(init, key, swept, train)
        rows = jax.eval_shape(order, key, np.int32(0))
        self._init = _compile(init, key, swept, train, options=RUN_ONCE)
        self._order = _compile(order, key, np.int32(0))
        self._step = _compile(step, state, swept, train, rows, np.int32(0), donate=0)
        self._count = {
            name: _compile(run.evaluate, state, swept, split, _rows(split, budget, 1)[0])
            for name, split in _held_out(dataset)
        }

    def init(self, chunk: Chunk) -> Any:
        """The state before the first step."""
        return self._init(*_only(chunk), self._dataset.train)

    def advance(self, state: Any, chunk: Chunk, first_step: int) -> Any:
        """The state `eval_every` steps later; the steps are queued, not waited for."""
        key, swept = _only(chunk)
        order = self._order(key, np.int32(first_step))
        for i in range(self._budget.eval_every):
            state = self._step(state, swept, self._dataset.train, order, np.int32(i))
        return state

    def evaluate(self, state: Any, chunk: Chunk) -> dict[str, np.ndarray]:
        """Losses, accuracies and `diverged_at`, `[1, 1]` each."""
        _, swept = _only(chunk)
        sums = []
        for name, split in _held_out(self._dataset):
            rows = _rows(split, self._budget, 1)
            parts = [self._count[name](state, swept, split, r) for r in rows]
            sums.append(jax.tree.map(lambda *v: sum(v), *parts))
        report = _report(state, *sums, self._dataset, self._budget)
        return {k: np.asarray(v).reshape(1, 1) for k, v in report.items()}

    def pick(self, state: Any, i: int, j: int) -> RunState:
        """A copy of the state, which will be donated."""
        return jax.tree.map(jnp.copy, state)


def _report(state, validation, test, dataset, budget):
    n, m = dataset.validation.labels.shape[0], dataset.test.labels.shape[0]
    return {
        "train_loss": state.sums.loss / budget.eval_every,
        "train_accuracy": state.sums.accuracy / budget.eval_every,
        "validation_loss": validation.loss / n,
        "validation_accuracy": validation.accuracy / n,
        "test_loss": test.loss / m,
        "test_accuracy": test.accuracy / m,
        "diverged_at": state.diverged_at,
    }


def _rows(split, budget, runs):
    """All example numbers in chunks of one size, the last with some past the end."""
    n = split.labels.shape[0]
    # Smaller chunks would make kernels too small, larger ones of images fill the memory.
    count = -(-n // min(max(budget.eval_rows // runs, 32), 1000))
    size = -(-n // count)
    return np.arange(count * size, dtype=np.int32).reshape(count, size)


def _held_out(dataset):
    return (("validation", dataset.validation), ("test", dataset.test))


def _over_grid(f, shared):
    """f(state, key, swept, *shared): states [points, seeds], keys [seeds], swept [points]."""
    rest = (None,) * shared
    return jax.vmap(jax.vmap(f, (0, 0, None, *rest)), (0, None, 0, *rest))


def _compile(f, *args, donate=(), options=None):
    return jax.jit(f, donate_argnums=donate).lower(*args).compile(options)


def _only(chunk):
    return chunk.keys[0], jax.tree.map(lambda v: v[0], chunk.swept)
