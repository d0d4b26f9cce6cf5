"""A grid of runs, points x seeds, to one record per run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.measure.engines import InTurn, Together
from bn_jax.measure.grid import Budget, Point, chunks
from bn_jax.training.run import Run, Swept

# The time per run stops falling at some tens of runs, so this need not be generous.
MEMORY = 2 << 30

METRICS = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy")


def sweep(
    run: Run,
    dataset: Any,
    points: Sequence[Point],
    seeds: Sequence[int],
    budget: Budget,
    *,
    max_runs_at_once: int | None = None,
    on_progress: Callable[[int], None] = lambda run_steps: None,
) -> Iterator[list[dict[str, Any]]]:
    """Trains every point with every seed, compiling once.

    A run's key is `jax.random.key(seed)`: one seed has one order of the data and one set
    of initial weights, at every point.

    Args:
      run: what is trained.
      dataset: with splits `train`, `validation` and `test`, as `bn_jax.data.load` gives.
      points, seeds: the grid.
      budget: steps and evaluations.
      max_runs_at_once: by default as many as fit in 2 GiB by a rough estimate.
      on_progress: called with the number of training steps, summed over runs, just done.

    Yields:
      Records of finished runs, in the order of the grid. Each has the point, `seed`,
      `steps`, `train_loss` (mean since the evaluation before), `validation_loss`,
      `validation_accuracy`, `test_loss`, `test_accuracy` (lists over the evaluations, None
      once the run is no longer finite), `diverged_at` (a step, or None) and `seconds`.
    """
    budget.check()
    engine_class = InTurn if _in_turn(run, dataset) else Together
    limit = max_runs_at_once or max(1, MEMORY // run_bytes(run, dataset))
    engine, compilation = None, 0.0
    for chunk in chunks(points, seeds, 1 if engine_class is InTurn else limit):
        if engine is None:
            engine, compilation = _timed(engine_class, run, dataset, budget, chunk)
        history, seconds = _train(engine, chunk, budget, on_progress)
        seconds["compilation"] = compilation
        yield [
            _record(point, seed, [_pick(h, i, j) for h in history], budget, seconds)
            for i, point in enumerate(chunk.points)
            for j, seed in enumerate(chunk.seeds)
        ]


def _train(engine, chunk, budget, on_progress):
    """The evaluations, and training and evaluation seconds for each run of the chunk."""
    state = engine.init(chunk)
    report, evaluation = _timed(engine.evaluate, state, chunk)
    history, training, done = [report], 0.0, 0
    while done < budget.steps and not np.all(history[-1]["diverged_at"] >= 0):
        state, seconds = _timed(engine.advance, state, chunk, done)
        training += seconds
        report, seconds = _timed(engine.evaluate, state, chunk)
        evaluation += seconds
        history.append(report)
        done += budget.eval_every
        on_progress(budget.eval_every * len(chunk.points) * len(chunk.seeds))
    on_progress((budget.steps - done) * len(chunk.points) * len(chunk.seeds))
    return history, {
        "per_step": training / max(done, 1) / chunk.runs,
        "training": training / chunk.runs,
        "evaluation": evaluation / chunk.runs,
        "runs_at_once": chunk.runs,
    }


def _record(point, seed, history, budget, seconds):
    finite = [
        h["diverged_at"] < 0 and np.isfinite([h[m] for m in METRICS]).all() for h in history
    ]
    end = finite.index(False) if False in finite else len(history)
    steps = list(range(0, budget.steps + 1, budget.eval_every))

    def series(values):
        kept = [None if v is None else round(float(v), 6) for v in values[:end]]
        return kept + [None] * (len(steps) - end)

    record = {**point._asdict(), "seed": seed, "steps": steps}
    losses = [None, *(h["loss_sum"] / budget.eval_every for h in history[1:])]
    record["train_loss"] = series(losses)
    record |= {m: series([h[m] for h in history]) for m in METRICS}
    record["diverged_at"] = None
    if end < len(history):
        at = int(history[end]["diverged_at"])
        # Finite losses, and then an evaluation that is not.
        record["diverged_at"] = at if at >= 0 else steps[end]
    return record | {"seconds": seconds}


def run_bytes(run: Run, dataset: Any) -> int:
    """A rough size of one run in a sweep: its state with gradients, and its activations."""
    state, rows, forward = _one_example(run, dataset)
    of_state = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(state))
    of_example = sum(v.aval.size * v.aval.dtype.itemsize for v in _outputs(forward))
    # State, its successor, gradients and updates. Every intermediate array of the forward
    # pass counts, although some are fused away, as those of the backward pass do not.
    return 4 * of_state + rows.size * of_example


def _in_turn(run, dataset):
    convolves = "conv_general_dilated" in str(_one_example(run, dataset)[2])
    return convolves and jax.default_backend() == "cpu"


def _one_example(run, dataset):
    """The shapes of state and batch, and the program that evaluates one example."""
    swept = Swept(jnp.float32(1), jnp.float32(1), jnp.float32(0.5))
    key = jax.random.key(0)
    state = jax.eval_shape(run.init, key, swept, dataset.train.inputs)
    rows = jax.eval_shape(lambda key: run.batches(key, 0, 1)[0], key)
    program = jax.make_jaxpr(run.evaluate)(state, swept, dataset.test, jnp.zeros(1, int))
    return state, rows, program.jaxpr


def _outputs(program):
    """The results of all of a program's operations, those of its subprograms included."""
    for equation in program.eqns:
        yield from equation.outvars
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _outputs(inner)


def _timed(f, *args):
    """f's result, and the seconds until it is there."""
    start = time.perf_counter()
    result = f(*args)
    jax.block_until_ready(result if not isinstance(result, Together | InTurn) else None)
    return result, time.perf_counter() - start


def _pick(report, i, j):
    return {k: v[i, j] for k, v in report.items()}
