"""Percentiles of what the units of the last hidden layer are given, and how far they drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from bn_jax.lab.data import Dataset
from bn_jax.lab.models import MLP
from bn_jax.lab.statistics import Record, Summary
from bn_jax.lab.statistics.convergence import estimate, speedup
from bn_jax.lab.sweeps import Evaluation, Point
from bn_jax.lab.training.run import Run, Swept

PERCENTILES = (15, 50, 85)
IMAGES = 1000


class Percentiles:
    """Keeps the `PERCENTILES` of every unit over test images, at every evaluation of a sweep.

    With running statistics. Before the first step these are of no batch, and nothing is kept.

    Attributes:
      kept: by (arm, `Point`, seed) a list over the evaluations of `[3, units]`.
    """

    def __init__(self):
        self.kept: dict[tuple[str, Point, int], list[np.ndarray]] = {}
        self._inputs: dict[str, Callable] = {}

    def __call__(self, arm: str, evaluation: Evaluation) -> None:
        """To be a `watch` of `bn_jax.lab.comparison.run`."""
        if not evaluation.step:
            return
        if arm not in self._inputs:
            self._inputs[arm] = _compiled(evaluation.run)
        images, chunk = sample(evaluation.dataset), evaluation.chunk
        for place, point, seed in chunk.wanted:
            train = evaluation.state(*place).train
            values = self._inputs[arm](train.params, train.batch_stats, images)
            # 2.4 ms for 1,000 images and 100 units; jax.numpy's, which sort, take 16.
            path = np.percentile(np.asarray(values), PERCENTILES, axis=0)
            self.kept.setdefault((arm, point, seed), []).append(path)


def sample(dataset: Dataset) -> jax.Array:
    """At most `IMAGES` of the test images as they are stored, from all over the set."""
    images = dataset.test.inputs
    return images[:: -(-len(images) // IMAGES)]


def _compiled(run: Run) -> Callable:
    """(params, batch_stats, stored images) to the inputs of the units."""
    model = run.model(Swept())
    assert isinstance(model, MLP)  # which `--model` is held to

    @jax.jit
    def inputs(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        return activation_inputs(model, variables, run.scaled(images))

    return inputs


def activation_inputs(model: MLP, variables: dict[str, Any], inputs: jax.Array) -> jax.Array:
    """The argument of the activation of an MLP's last hidden layer, `[n, units]`.

    That is the output of the layer's norm where the norm goes before the activation, and of
    its dense layer elsewhere; with running statistics.

    Args:
      model: whose last hidden layer it is.
      variables: `params`, and `batch_stats`, which may be empty.
      inputs: `[n, ...]` as the model takes them.
    """
    names = []

    def is_layer(module, method):
        layer = method == "__call__" and len(module.path) == 1
        if layer:
            names.append(module.name)
        return layer

    _, kept = model.apply(
        variables, inputs, train=False, capture_intermediates=is_layer,
        mutable=["intermediates"],
    )  # fmt: skip
    place = names.index(f"Dense_{len(model.features) - 1}")
    # Layers are called in their order: after a dense one its norm, if that comes first.
    normed = model.norm is not None and "before" in model.places
    return cast(Any, kept)["intermediates"][names[place + normed]]["__call__"][0]


def drift(paths: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """How far each unit's percentiles wander, in units of their distance, `[units]`.

        sqrt(mean_tp (q_tp - mean_t q_tp)^2) / mean_t (q_t,85 - q_t,15)

    Of distributions that stay as they are it is 0. It is the same of a x + b as of x, so
    units and networks of different scales compare. The three percentiles count alike, so
    that a distribution that widens drifts too. It does not grow with the number of
    evaluations, as would the length of the percentiles' paths, most of which is the noise of
    single steps. A unit that is given the same for all examples has infinite drift.

    Args:
      paths: the 15th, 50th and 85th percentile at evaluations, `[evaluations, 3, units]`.
    """
    paths = np.asarray(paths, np.float64)
    wandering = np.sqrt(paths.var(0).mean(0))
    distance = (paths[:, 2] - paths[:, 0]).mean(0)
    infinite = np.full_like(distance, np.inf)
    return np.divide(wandering, distance, out=infinite, where=distance > 0)


def typical_unit(drifts: np.ndarray) -> int:
    """The unit of median drift, of an even number the lower of the two; drifts `[units]`."""
    return int(np.argsort(drifts, kind="stable")[(len(drifts) - 1) // 2])


def drift_summary(
    records: Sequence[Record],
    summary: Summary,
    paths: Mapping[tuple[str, Point, int], Sequence[np.ndarray]],
) -> dict[str, Any]:
    """The drift of a comparison's arms, as `summary.json` has it.

    A run's drift is the median over its units. That of a run that diverged is infinite: it
    keeps the weights that it had, and would pass for the most stable of all.

    Args:
      records, summary: of the comparison.
      paths: percentiles by (arm, `Point`, seed), `[evaluations, 3, units]`.

    Returns:
      `arms` at their own best points (`median` and `ci95` over seeds) and `times_smaller` than
      the baseline's (`ratio` and `ci95`); both again in each of `by_rate`, for all arms at
      one learning rate and initial scale. What is infinite is None.
    """
    runs: dict[tuple, list] = {}
    for r in records:
        units = np.median(drift(paths[r.run]))
        lost = r.diverged_at is not None or not np.isfinite(units)
        runs.setdefault((r.arm, r.point), []).append(None if lost else float(units))
    momentums = {(arm.arm, arm.momentum) for arm in summary.arms}
    rates: dict[tuple, list] = {}
    for row in summary.points:
        if (row.arm, row.momentum) in momentums:
            rates.setdefault(row.point[:2], []).append(row)
    whole = [rows for rows in rates.values() if len(rows) == len(summary.arms)]
    return {
        **_compared(summary.arms, runs),
        "by_rate": [_compared(rows, runs) for rows in whole],
    }


def _compared(rows, runs):
    base, *others = rows
    over = runs[base.arm, base.point]
    ratios = [(row.arm, speedup(over, runs[row.arm, row.point])) for row in others]
    return {
        "arms": [_arm(row, runs) for row in rows],
        "times_smaller": [
            {"arm": arm, "over": base.arm, "ratio": ratio, "ci95": ci95}
            for arm, (ratio, ci95) in ratios
        ],
    }


def _arm(row, runs):
    found = estimate(runs[row.arm, row.point]).to_json()
    return {"arm": row.arm, **row.point._asdict(), **found}
