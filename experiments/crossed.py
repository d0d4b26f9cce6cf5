"""Statistics for experiments whose arms are all combinations of some factors.

Such arms are no two sides of a comparison: they have no common baseline, and their numbers of
steps may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.conduct import Training


def best_runs(records: list[dict]) -> dict[str, list[dict]]:
    """By arm the runs, by seed, of its point with the highest median validation accuracy.

    At the last step; a run that diverged counts as 0.
    """
    from bn_jax.measure import Point

    points: dict[str, dict[tuple, list[dict]]] = {}
    for r in records:
        runs = points.setdefault(r["arm"], {}).setdefault(Point.of(r), [])
        runs.append(r)
        runs.sort(key=lambda r: r["seed"])
    return {arm: max(own.values(), key=_typical) for arm, own in points.items()}


def final(record: dict, metric: str = "test_accuracy") -> float:
    """At the last step; 0 where the run had diverged."""
    return record[metric][-1] or 0.0


def accuracy(
    training: Training, arm: str, split: Any, batch_size: int | None = None
) -> Callable[[dict[str, Any]], Any]:
    """From variables of an arm's network to its accuracy on a split, float32 `[]`.

    As at inference; or, with a `batch_size`, with the statistics of batches of that size, or
    of the whole split where that is smaller, and without dropout. Of what is left over at the
    end nothing counts.
    """
    import jax
    from jax import lax

    from bn_jax.training.metrics import correct
    from bn_jax.training.run import Swept

    run = training.runs[arm]
    model = run.model(Swept())
    if getattr(model, "dropout", 0):
        model = model.clone(dropout=0.0)
    train, examples = batch_size is not None, split.labels.size
    size = min(batch_size or examples, examples)
    count = examples // size
    batches = jax.tree.map(lambda v: v[: count * size].reshape(-1, size, *v.shape[1:]), split)

    def whole(variables):
        def one(batch):
            inputs = run.scaled(batch.inputs)
            outputs, _ = model.apply(variables, inputs, train=train, mutable=["batch_stats"])
            return correct(outputs, batch.labels).mean()

        return lax.map(one, batches).mean()

    return jax.jit(whole)


def estimate(values: list[float]) -> dict[str, Any]:
    """Their `median` and its `ci95`, a percentile bootstrap interval."""
    from bn_jax.measure import convergence

    return convergence.estimate(values)


def difference(a: list[float], b: list[float]) -> dict[str, Any]:
    """Median over the seeds of a - b, with its interval."""
    return estimate([x - y for x, y in zip(a, b, strict=True)])


def points_text(value: dict[str, Any]) -> str:
    """An estimate in percentage points: "+1.2 [+0.3, +2.0]"."""
    median, (low, high) = value["median"], value["ci95"]
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in (median, low, high)))


def _typical(runs):
    import statistics

    return statistics.median(final(r, "validation_accuracy") for r in runs)
