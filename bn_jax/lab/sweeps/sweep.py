"""A grid of runs, points x seeds, to one record per run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bn_jax.lab.statistics.records import Budget, Point, Record, Seconds
from bn_jax.lab.sweeps.engines import engine_class
from bn_jax.lab.sweeps.grid import Chunk, chunks
from bn_jax.lab.sweeps.layouts import layout
from bn_jax.lab.sweeps.programs import traced
from bn_jax.lab.training.run import Run, RunState

# The time per run stops falling at some tens of runs, so this need not be generous.
MEMORY = 2 << 30

METRICS = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
TRAINING = ("train_loss", "train_accuracy")


class Underway(NamedTuple):
    """A chunk between two evaluations: all that the rest of it follows from.

    Attributes:
      done: steps of its runs.
      state: of the engine; donated to the next step.
      history: the reports so far, that before the first step included.
      seconds: spent on training and on evaluation.
    """

    done: int
    state: Any
    history: list[dict[str, np.ndarray]]
    seconds: tuple[float, float]


class Evaluation(NamedTuple):
    """What a sweep shows as it goes.

    Attributes:
      run, dataset: what is trained, on what.
      chunk: the rectangle of the grid.
      step: of its runs.
      run_steps: training steps since the last one, summed over the chunk's runs.
      report: what was measured, `[points, seeds]` each.
      state: the `RunState` of the run of a point and a seed of the chunk, by their places.
      last: whether the chunk ends here; `run_steps` has what it leaves out.
      kept: whether a run's state here is, so far, the one that it ends with, bool
        `[points, seeds]`: with `patience` the best, without it the last.
      number: of the chunk, counted from 0.
      underway: from which a sweep can go on.
    """

    run: Run
    dataset: Any
    chunk: Chunk
    step: int
    run_steps: int
    report: dict[str, np.ndarray]
    state: Callable[[int, int], RunState]
    last: bool
    kept: np.ndarray
    number: int
    underway: Underway


def sweep(
    run: Run,
    dataset: Any,
    points: Sequence[Point],
    seeds: Sequence[int],
    budget: Budget,
    *,
    arm: str = "",
    max_runs_at_once: int | None = None,
    parallel: str = "auto",
    on_evaluation: Callable[[Evaluation], None] = lambda _: None,
    first: int = 0,
    resume: Callable[[Any], Underway | None] = lambda state: None,
    done: Callable[[Point, int], bool] = lambda point, seed: False,
) -> Iterator[list[Record]]:
    """Trains every point with every seed, compiling once.

    A run's key is `jax.random.key(seed)`: one seed has one order of the data and one set
    of initial weights, at every point.

    Args:
      run: what is trained.
      dataset: with splits `train`, `validation` and `test`, as `bn_jax.lab.data.load` gives.
      points, seeds: the grid.
      budget: steps and evaluations.
      arm: its name, for the records.
      max_runs_at_once: on a device; by default as many as fit in 2 GiB by a rough estimate.
      parallel: how several devices share the work: `bn_jax.lab.sweeps.layouts.PARALLEL`.
      on_evaluation: called after every evaluation.
      first: number of the chunk to begin with, those before it being done.
      resume: from a state like the engine's to where that chunk goes on, or None.
      done: whether a run need not be trained; chunks of such runs alone are passed over.

    Yields:
      Records of finished runs, in the order of the grid.
    """
    budget.check()
    one = traced(run, dataset)
    devices = layout(parallel, len(points), len(seeds), one.small(budget.eval_every))
    make = engine_class(one, devices)
    limit = devices.at_once(make, max_runs_at_once or MEMORY // one.bytes or 1)
    rectangles = enumerate(chunks(points, seeds, limit, devices.block))
    engine, compilation = None, 0.0
    for number, chunk in itertools.islice(rectangles, first, None):
        if all(done(point, seed) for _, point, seed in chunk.wanted):
            continue
        start = None
        if engine is None:
            engine, compilation = _timed(devices.engine, make, run, dataset, budget, chunk)
        if number == first:
            start = resume(engine.init(chunk))

        def show(number=number, **seen):
            on_evaluation(Evaluation(run=run, dataset=dataset, number=number, **seen))

        history, seconds = _train(engine, chunk, budget, show, start)
        seconds = dataclasses.replace(seconds, compilation=compilation)
        whole = {name: np.stack([h[name] for h in history]) for name in history[0]}
        yield [
            _record(
                arm, point, seed, {k: v[:, *place] for k, v in whole.items()}, budget, seconds
            )
            for place, point, seed in chunk.wanted
        ]


def alike(parallel: str, dataset: Any, trained: Sequence[tuple[Run, Budget, int]]) -> str:
    """How all of these are trained, so that their seconds compare.

    Args:
      parallel: as for `sweep`; other than `auto` it is what comes back.
      dataset: that all are trained on.
      trained: of every sweep the run, the budget and the number of runs.

    Returns:
      For `auto` and one CPU `cores`, if that suits all of them, else `single`.
    """
    one_cpu = jax.device_count() == 1 and jax.default_backend() == "cpu"
    if parallel != "auto" or not one_cpu:
        return parallel
    several = max(runs for _, _, runs in trained) > 1
    small = several and all(
        traced(run, dataset).small(budget.eval_every) for run, budget, _ in trained
    )
    return "cores" if small else "single"


def _train(engine, chunk, budget, show, start):
    """The evaluations, and training and evaluation seconds for each run of the chunk."""
    if start is None:
        state = engine.init(chunk)
        report, seconds = _timed(engine.evaluate, state, chunk)
        start = Underway(0, state, [report], (0.0, seconds))
    done, state, history, (training, evaluation) = start
    history = [*history]
    going = _going(chunk, done, history, budget)

    def show_after(run_steps):
        pick = functools.partial(engine.pick, state)
        runs = run_steps * len(chunk.wanted)
        ended = not going.any()
        kept = _kept(history, budget, ended)
        underway = Underway(done, state, history, (training, evaluation))
        show(
            chunk=chunk, step=done, run_steps=runs, report=history[-1], state=pick,
            last=ended, kept=kept, underway=underway,
        )  # fmt: skip

    if done == 0:
        show_after(0)
    while going.any():
        state, seconds = _timed(engine.advance, state, chunk, done, going)
        training += seconds
        report, seconds = _timed(engine.evaluate, state, chunk, going)
        evaluation += seconds
        history.append({k: np.where(going, v, history[-1][k]) for k, v in report.items()})
        done += budget.eval_every
        going = _going(chunk, done, history, budget)
        show_after(budget.eval_every + (0 if going.any() else budget.steps - done))
    per_step, *whole = (s / chunk.runs for s in (training / max(done, 1), training, evaluation))
    return history, Seconds(per_step, *whole, runs_at_once=chunk.runs)


def _kept(history, budget, ended):
    shape = history[-1]["diverged_at"].shape
    if budget.patience is None:
        return np.full(shape, ended)
    kept, latest = np.zeros(shape, bool), len(history) - 1
    for place in np.ndindex(shape):
        accuracies = np.nan_to_num([h["validation_accuracy"][place] for h in history])
        kept[place] = budget.stop(accuracies) is None and np.argmax(accuracies) == latest
    return kept


def _going(chunk, done, history, budget):
    """Which runs train on, `[points, seeds]`: none that has ended or only fills up."""
    diverged = history[-1]["diverged_at"] >= 0
    going = np.zeros(diverged.shape, bool)
    going[: len(chunk.points), : len(chunk.seeds)] = done < budget.steps
    going &= ~diverged
    if budget.patience is not None:
        accuracies = np.stack([h["validation_accuracy"] for h in history])
        for place in zip(*np.nonzero(going), strict=True):
            going[place] = budget.stop(accuracies[:, *place]) is None
    return going


def _record(
    arm: str,
    point: Point,
    seed: int,
    history: dict[str, np.ndarray],
    budget: Budget,
    seconds: Seconds,
) -> Record:
    steps = list(range(0, budget.steps + 1, budget.eval_every))
    finite = np.isfinite([history[m] for m in METRICS]).all(0) & (history["diverged_at"] < 0)
    end = len(finite) if finite.all() else int(finite.argmin())
    stop = budget.stop(history["validation_accuracy"][:end].tolist())
    diverged_at = None
    if stop is not None:
        end = stop[0] + 1
    elif end < len(finite):
        at = int(history["diverged_at"][end])
        # Finite losses, and then an evaluation that is not.
        diverged_at = at if at >= 0 else steps[end]

    def series(name, restored=None):
        values = np.round(history[name].astype(np.float64), 6).tolist()
        rest = None if restored is None else values[restored[1]]
        return values[:end] + [rest] * (len(steps) - end)

    return Record(
        arm=arm,
        **point._asdict(),
        seed=seed,
        steps=steps,
        **{m: [None, *series(m)[1:]] for m in TRAINING},
        **{m: series(m, stop) for m in METRICS},
        diverged_at=diverged_at,
        stopped_at=None if stop is None else steps[stop[0]],
        restored=None if stop is None else steps[stop[1]],
        seconds=seconds,
    )


def _timed(f, *args):
    """f's result, and the seconds until it is there."""
    start = time.perf_counter()
    result = f(*args)
    jax.block_until_ready(result)
    return result, time.perf_counter() - start
