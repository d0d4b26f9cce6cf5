"""A chunk of the grid on a CPU's cores: every run for itself, in threads."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from bn_jax.lab.statistics.records import Budget
from bn_jax.lab.sweeps.grid import Chunk
from bn_jax.lab.sweeps.programs import traced
from bn_jax.lab.training.run import RunState


class ThreadedRuns:
    """A chunk of any size, by an engine for one run that every core calls.

    XLA's own threads share out what one operation does; those of small networks are too small
    for that (`benchmarks.mlp_steps`). A run has one program, and so the same numbers to the
    bit whichever others are trained with it, and whether that is on one core or many.

    Between two evaluations a run goes from core to core in laps, of which there are so many
    that all cores end at about the same time: two cores train five runs in 2.5 times what one
    takes, not in 3: the bound of McNaughton 1959, "Scheduling with deadlines and loss
    functions", for work that may be interrupted. Its interface is that of the engines; a state
    is a list of `RunState`s.
    """

    def __init__(self, make: type, run: Any, dataset: Any, budget: Budget, layout: Any,
                 example: Chunk):  # fmt: skip
        self._at_once = min(cores(), example.runs)
        most = traced(run, dataset).calls(budget.eval_every)
        laps = _laps(example.runs, self._at_once, budget.eval_every, most)
        budget = budget._replace(laps=laps)
        self._budget, self._wide = budget, example.keys.shape[0]
        self._chunk, self._runs = example, _split(example)
        self._shared = sum(v.nbytes for v in jax.tree.leaves(dataset.train))
        self._engine = make(run, dataset, budget, layout, self._runs[0])
        self._threads = ThreadPoolExecutor(self._at_once)

    def init(self, chunk: Chunk) -> list[RunState]:
        """The state of every run before its first step."""
        return self._each(self._engine.init, [(one,) for one in self._alone(chunk)])

    def advance(
        self,
        state: Sequence[RunState],
        chunk: Chunk,
        first_step: int,
        going: np.ndarray | None = None,
    ) -> list[RunState]:
        """The state `eval_every` steps later, of runs that are not `going` as it was."""
        runs, chosen = self._alone(chunk), self._chosen(going)
        later: list[RunState | Future[RunState]] = list(state)
        with self._asking() as ask:
            # One seed has one order, at every point.
            orders = {
                j: ask(self._engine.order, runs[j], first_step)
                for j in {k % self._wide for k in chosen}
            }
            for since in range(0, self._budget.eval_every, self._budget.lap):
                for k in chosen:
                    # What a thread waits for was asked for before, and so has begun.
                    order = orders[k % self._wide]
                    later[k] = ask(self._lap, later[k], runs[k], order, since)
            return [_result(v) for v in later]

    def evaluate(
        self, state: Sequence[RunState], chunk: Chunk, going: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Losses, accuracies and `diverged_at`, `[points, seeds]`; 0 of runs not `going`."""
        runs, chosen = self._alone(chunk), self._chosen(going)
        reports = self._each(self._engine.evaluate, [(state[k], runs[k]) for k in chosen])
        found = {}
        for name, one in reports[0].items():
            found[name] = np.zeros((len(runs) // self._wide, self._wide), one.dtype)
            found[name].flat[chosen] = np.ravel([report[name] for report in reports])
        return found

    def training_memory(self) -> int:
        """Bytes that `advance` holds: the data, a program for each core, runs that wait."""
        program = self._engine.training_memory() - self._shared
        waiting = len(self._runs) - self._at_once
        programs = self._at_once * program + waiting * self._engine.state_memory()
        return self._shared + programs

    def pick(self, state: Sequence[RunState], i: int, j: int) -> RunState:
        """A copy of the state of the run of point i and seed j."""
        return self._engine.pick(state[i * self._wide + j], 0, 0)

    def _lap(self, state, one, order, since):
        later = self._engine.lap(_result(state), one, order.result(), since)
        return jax.block_until_ready(later)

    def _each(self, f: Callable, rows: Sequence[tuple]) -> list[Any]:
        with self._asking() as ask:
            return [_result(v) for v in [ask(f, *row) for row in rows]]

    @contextlib.contextmanager
    def _asking(self):
        try:
            yield self._threads.submit
        except BaseException:  # what has not begun must not keep the process
            self._threads.shutdown(wait=False, cancel_futures=True)
            raise

    def _chosen(self, going):
        return list(range(len(self._runs))) if going is None else np.flatnonzero(going).tolist()

    def _alone(self, chunk):
        if chunk is not self._chunk:
            self._chunk, self._runs = chunk, _split(chunk)
        return self._runs


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _result(value):
    return value.result() if isinstance(value, Future) else value


def _laps(runs: int, at_once: int, steps: int, calls: int) -> int:
    """The fewest with which the core that does most has nearly as little as is possible."""

    def longest(laps):
        return math.ceil(runs * laps / at_once) / laps

    choices = [n for n in range(1, min(at_once, calls) + 1) if steps % n == 0]
    best = min(map(longest, choices))
    return next(n for n in choices if longest(n) <= 1.05 * best)


def _split(chunk: Chunk) -> list[Chunk]:
    """A chunk for every run, in the order of arrays `[points, seeds]`."""
    keys = [chunk.keys[j : j + 1] for j in range(chunk.keys.shape[0])]
    points = zip(*(np.asarray(v)[:, None] for v in chunk.swept), strict=True)
    swept = [type(chunk.swept)(*values) for values in points]
    return [Chunk((), (), key, values) for values in swept for key in keys]
