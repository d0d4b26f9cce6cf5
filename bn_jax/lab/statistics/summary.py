"""From the records of a comparison to its answer: `summary.json`.

Choices (which learning rate) are made on validation accuracy; what is reported is test
accuracy.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from bn_jax.lab.statistics.convergence import estimate, median, speedup, steps_to_target
from bn_jax.lab.statistics.records import Point

Record = dict[str, Any]

# A learning rate trains a network if it ends with at least this share of the target.
TRAINS = 0.9


class Target(NamedTuple):
    """The accuracy to reach on the test set, the one on validation, and where it is from."""

    test: float
    validation: float
    chosen: str


def summarize(
    records: Sequence[Record], *, baseline: str, target: float | None = None
) -> dict[str, Any]:
    """The statistics of a comparison, as `summary.json` has them.

    Each arm appears at its own best point of the grid: the one with the fewest median
    steps to the target on validation, or, where none gets there, the highest median best
    accuracy. `at_same_learning_rate` has all arms at the baseline's; it is
    None where there is only one, or an arm without it.

    Args:
      records: of finished runs, each with its `arm`; every point with the same seeds.
      baseline: the arm that the others are compared with.
      target: test accuracy to reach; by default the best that the baseline reached, as in
        Ioffe & Szegedy 2015, section 4.2.2: at its most accurate point, the median over
        seeds (the lower one, so that half of its runs do reach it) of each run's best.
    """
    by_point = _group(records)
    goal = _target(by_point[baseline], target)
    best = {arm: _best(points, goal) for arm, points in by_point.items()}
    base = best[baseline]
    arms = [_arm(by_point, arm, point, goal) for arm, point in best.items()]
    for row, (arm, point) in zip(arms, best.items(), strict=True):
        row["trainable_learning_rates"] = _trainable(by_point, arm, point, goal)
    return {
        "baseline": baseline,
        "budget_steps": records[0]["steps"][-1],
        "target": {"metric": "test_accuracy", "value": goal.test, "chosen": goal.chosen},
        "arms": arms,
        "speedup": _speedups(by_point, best, baseline, goal),
        "at_same_learning_rate": _at_same(by_point, baseline, base, goal),
        "by_point": [
            _arm(by_point, arm, point, goal)
            for arm, points in by_point.items()
            for point in points
        ],
    }


def _group(records):
    """{arm: {point: its runs by seed}}, in the order of the records."""
    groups: dict[str, dict[Point, list[Record]]] = {}
    for r in records:
        point = Point.of(r)
        groups.setdefault(r["arm"], {}).setdefault(point, []).append(r)
    for runs in itertools.chain.from_iterable(points.values() for points in groups.values()):
        runs.sort(key=lambda r: r["seed"])
    return groups


def _target(points, given):
    if given is not None:
        return Target(given, given, "given")

    def typical_best(runs, metric):
        return statistics.median_low(_max(r[metric]) for r in runs)

    runs = max(points.values(), key=lambda runs: typical_best(runs, "validation_accuracy"))
    return Target(
        typical_best(runs, "test_accuracy"),
        typical_best(runs, "validation_accuracy"),
        "best of the baseline",
    )


def _best(points, goal):
    def order(point):
        runs = points[point]
        needed = median(_steps(runs, "validation_accuracy", goal.validation))
        accuracy = statistics.median(_max(r["validation_accuracy"]) for r in runs)
        return (float("inf") if needed is None else needed, -accuracy)

    return min(points, key=order)


def _like(points, base):
    """The points at the learning rate and initial scale of another arm's."""
    return {
        p: runs
        for p, runs in points.items()
        if (p.learning_rate, p.init_scale) == (base.learning_rate, base.init_scale)
    }


def _at_same(by_point, baseline, base, goal):
    """All arms at the baseline's rate and initial scale; None where there are no others."""
    points = itertools.chain.from_iterable(by_point.values())
    if len({(p.learning_rate, p.init_scale) for p in points}) == 1:
        return None
    like = {arm: _like(points, base) for arm, points in by_point.items()}
    if not all(like.values()):  # an arm has rates of its own
        return None
    same = {arm: _best(points, goal) for arm, points in like.items()}
    return {
        "learning_rate": base.learning_rate,
        "init_scale": base.init_scale,
        "arms": [_arm(by_point, arm, point, goal) for arm, point in same.items()],
        "speedup": _speedups(by_point, same, baseline, goal),
    }


def _arm(by_point, arm, point, goal):
    runs = by_point[arm][point]
    steps = _steps(runs, "test_accuracy", goal.test)
    final = [r["test_accuracy"][-1] or 0.0 for r in runs]
    return {
        "arm": arm,
        **point._asdict(),
        "seeds": len(runs),
        "reached": sum(s is not None for s in steps),
        "steps_to_target": estimate(steps),
        "seconds_to_target": estimate(_seconds(runs, steps)),
        "max_accuracy": estimate([_max(r["test_accuracy"]) for r in runs]),
        "final_accuracy": estimate(final),
        "trains": statistics.median(final) >= TRAINS * goal.test,
        "diverged": sum(r["diverged_at"] is not None for r in runs),
    }


def _trainable(by_point, arm, best, goal):
    """Smallest and largest learning rate that trains, all else as at the arm's best."""
    rates = [
        p.learning_rate
        for p in by_point[arm]
        if p[1:] == best[1:] and _arm(by_point, arm, p, goal)["trains"]
    ]
    return [min(rates), max(rates)] if rates else None


def _speedups(by_point, chosen, baseline, goal):
    return [
        {"arm": arm, "over": baseline}
        | _speedup(by_point[baseline][chosen[baseline]], by_point[arm][point], goal)
        for arm, point in chosen.items()
        if arm != baseline
    ]


def _speedup(base, runs, goal):
    base_steps, steps = (_steps(r, "test_accuracy", goal.test) for r in (base, runs))
    budget = [r["steps"][-1] for r in base]
    return {
        "steps": _ratio(base_steps, steps, budget),
        "seconds": _ratio(
            _seconds(base, base_steps), _seconds(runs, steps), _seconds(base, budget)
        ),
    }


def _ratio(base, arm, budget):
    """The speed-up; or, where only the base did not reach, what it is at the least."""
    ratio, interval = speedup(base, arm)
    result: dict[str, Any] = {"ratio": ratio, "ci95": interval}
    needed, most = median(arm), median(budget)
    if median(base) is None and needed and most:
        result["at_least"] = most / needed
    return result


def _steps(runs, metric, target):
    return [steps_to_target(r["steps"], r[metric], target) for r in runs]


def _seconds(runs, steps):
    return [
        None if s is None else s * r["seconds"]["per_step"]
        for r, s in zip(runs, steps, strict=True)
    ]


def _max(values):
    return max((v for v in values if v is not None), default=0.0)
