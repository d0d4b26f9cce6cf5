"""Statistics for experiments whose arms are all combinations of some factors.

Such arms are no two sides of a comparison: they have no common baseline, and their numbers of
steps may differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax

from bn_jax.lab.data import Split
from bn_jax.lab.experiment import Training
from bn_jax.lab.report import text
from bn_jax.lab.statistics import Point, Record
from bn_jax.lab.statistics.convergence import Estimate, estimate
from bn_jax.lab.training.metrics import correct
from bn_jax.lab.training.run import Swept

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def best_runs(records: list[Record]) -> dict[str, list[Record]]:
    """By arm the runs, by seed, of its point with the highest median validation accuracy.

    At the last step; a run that diverged counts as 0.
    """
    points: dict[str, dict[Point, list[Record]]] = {}
    for r in records:
        runs = points.setdefault(r.arm, {}).setdefault(r.point, [])
        runs.append(r)
        runs.sort(key=lambda r: r.seed)
    return {arm: max(own.values(), key=_typical) for arm, own in points.items()}


def _typical(runs):
    return statistics.median(r.final("validation_accuracy") for r in runs)


def accuracy(
    training: Training, arm: str, split: Split, batch_size: int | None = None
) -> Callable[[dict[str, Any]], jax.Array]:
    """From variables of an arm's network to its accuracy on a split, float32 `[]`.

    As at inference; or, with a `batch_size`, with the statistics of batches of that size, or
    of the whole split where that is smaller, and without dropout. Of what is left over at the
    end nothing counts.
    """
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


def difference(a: list[float], b: list[float]) -> Estimate:
    """Median over the seeds of a - b, with its interval."""
    return estimate([x - y for x, y in zip(a, b, strict=True)])


def points_text(value: Estimate) -> str:
    """An estimate in percentage points: "+1.2 [+0.3, +2.0]"."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in known(value)))


def percent_cell(value: Estimate | None) -> str:
    """An estimate in per cent as a cell of a table, in two lines; "-" for None."""
    return text.cell(value._replace(seeds=2), text.percent) if value else "-"


def known(value: Estimate) -> tuple[float, float, float]:
    """Returns median, low and high end of an estimate that every run has a number for."""
    median, (low, high) = value.median, value.ci95
    assert median is not None
    assert low is not None
    assert high is not None
    return median, low, high


def draw_percent(ax: Axes, x: Sequence[float], values: Sequence[Estimate], **look: Any) -> None:
    """Medians in per cent as a line, with their intervals; `look` as of `errorbar`."""
    middle, low, high = 100 * np.array([known(v) for v in values]).T
    # Resampled medians lie around the median, which rounding may put a hair outside.
    ends = np.maximum([middle - low, high - middle], 0)
    ax.errorbar(x, middle, ends, capsize=2.5, elinewidth=1, **look)
