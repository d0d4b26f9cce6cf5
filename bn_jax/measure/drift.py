"""How far the distribution of what a unit is given drifts in training, as one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_jax.measure.convergence import estimate, speedup
from bn_jax.measure.grid import Point


def drift(paths: Any) -> np.ndarray:
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
    records: Sequence[dict], summary: Mapping[str, Any], paths: Mapping[tuple, Any]
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
        units = np.median(drift(paths[r["arm"], Point.of(r), r["seed"]]))
        lost = r["diverged_at"] is not None or not np.isfinite(units)
        runs.setdefault((r["arm"], Point.of(r)), []).append(None if lost else float(units))
    momentums = {(arm["arm"], arm["momentum"]) for arm in summary["arms"]}
    rates: dict[tuple, list] = {}
    for row in summary["by_point"]:
        if (row["arm"], row["momentum"]) in momentums:
            rates.setdefault((row["learning_rate"], row["init_scale"]), []).append(row)
    whole = [rows for rows in rates.values() if len(rows) == len(summary["arms"])]
    return {
        **_compared(summary["arms"], runs),
        "by_rate": [_compared(rows, runs) for rows in whole],
    }


def _compared(rows, runs):
    base, *others = rows
    over = runs[base["arm"], Point.of(base)]
    ratios = [(row["arm"], speedup(over, runs[row["arm"], Point.of(row)])) for row in others]
    return {
        "arms": [_arm(row, runs) for row in rows],
        "times_smaller": [
            {"arm": arm, "over": base["arm"], "ratio": ratio, "ci95": ci95}
            for arm, (ratio, ci95) in ratios
        ],
    }


def _arm(row, runs):
    point = Point.of(row)
    return {"arm": row["arm"], **point._asdict(), **estimate(runs[row["arm"], point])}
