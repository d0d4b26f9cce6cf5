"""From the records of a comparison to its answer: `summary.json`.

Choices (which learning rate) are made on validation accuracy; what is reported is test
accuracy.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from bn_jax.lab.statistics.convergence import (
    Estimate,
    Ratio,
    estimate,
    median,
    ratio,
    steps_to_target,
)
from bn_jax.lab.statistics.records import Point, Record

# A learning rate trains a network if it ends with at least this share of the target.
TRAINS = 0.9
ESTIMATES = ("steps_to_target", "seconds_to_target", "max_accuracy", "final_accuracy")


class Target(NamedTuple):
    """The test accuracy to reach, where it is from, and the one on validation."""

    value: float
    chosen: str
    validation: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the entry `target` of `summary.json`."""
        return {"metric": "test_accuracy", "value": self.value, "chosen": self.chosen}


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """The runs of an arm at one point of the grid; the fields are keys of `summary.json`.

    Attributes:
      seeds, reached, diverged: how many runs, and how many reached the target or diverged.
      trains: whether the median run ends with at least 90 % of the target.
      trainable_learning_rates: the smallest and the largest rate that does, all else as here;
        only of an arm at its best point.
    """

    arm: str
    learning_rate: float
    init_scale: float
    momentum: float | None
    seeds: int
    reached: int
    steps_to_target: Estimate
    seconds_to_target: Estimate
    max_accuracy: Estimate
    final_accuracy: Estimate
    trains: bool
    diverged: int
    trainable_learning_rates: tuple[float, float] | None = None

    @property
    def point(self) -> Point:
        """The point of the grid."""
        return Point(self.learning_rate, self.init_scale, self.momentum)

    @property
    def lost(self) -> bool:
        """Whether half of the runs or more diverged: no median describes the others."""
        return 2 * self.diverged >= self.seeds

    @property
    def count(self) -> str:
        """ "4 of 5": the runs that reached the target."""
        return f"{self.reached} of {self.seeds}"

    def runs(self, records: Sequence[Record]) -> list[Record]:
        """Returns the records of the runs at this point."""
        return [r for r in records if (r.arm, r.point) == (self.arm, self.point)]

    def to_json(self) -> dict[str, Any]:
        """Returns an entry of `arms` of `summary.json`."""
        rates = self.trainable_learning_rates
        own = {"trainable_learning_rates": rates and [*rates]}
        return vars(self) | own | {name: getattr(self, name).to_json() for name in ESTIMATES}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ArmResult:
        """Reads an entry of `arms` or `by_point`; keys of others are left out."""
        own: dict[str, Any] = {f.name: row.get(f.name) for f in dataclasses.fields(cls)}
        own |= {name: Estimate.from_json(row.get(name), row["seeds"]) for name in ESTIMATES}
        return cls(**own)


class Speedup(NamedTuple):
    """An arm beside its baseline: steps and seconds to the target."""

    arm: ArmResult
    over: ArmResult
    steps: Ratio
    seconds: Ratio

    def to_json(self) -> dict[str, Any]:
        """Returns an entry of `speedup` of `summary.json`."""
        ratios = {"steps": self.steps.to_json(), "seconds": self.seconds.to_json()}
        return {"arm": self.arm.arm, "over": self.over.arm, **ratios}


@dataclasses.dataclass(frozen=True)
class Summary:
    """Arms at their best points, and at every point of the grid.

    Attributes:
      baseline: the arm that the others are compared with; None where there is none.
      budget: training steps of a run.
      target: what the runs are timed to.
      arms: each at its own best point.
      speedups: of every arm but the baseline.
      same: all arms at the baseline's rate and scale; None where that was not measured.
      points: every arm at every point; those of `arms` where there is nothing else.
    """

    baseline: str | None
    budget: int
    target: Target
    arms: tuple[ArmResult, ...]
    speedups: tuple[Speedup, ...]
    same: Self | None
    points: tuple[ArmResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns what `summary.json` has of a comparison."""
        same = None
        if self.same:
            at = self.same.arms[0]
            same = {
                "learning_rate": at.learning_rate,
                "init_scale": at.init_scale,
                "arms": [_without_rates(arm) for arm in self.same.arms],
                "speedup": [speedup.to_json() for speedup in self.same.speedups],
            }
        return {
            "baseline": self.baseline,
            "budget_steps": self.budget,
            "target": self.target.to_json(),
            "arms": [arm.to_json() for arm in self.arms],
            "speedup": [speedup.to_json() for speedup in self.speedups],
            "at_same_learning_rate": same,
            "by_point": [_without_rates(point) for point in self.points],
        }

    @classmethod
    def from_json(cls, summary: Mapping[str, Any], **more: Any) -> Self:
        """Reads what `to_json` returned; `more` are fields of a subclass."""
        arms = {row["arm"]: ArmResult.from_json(row) for row in summary["arms"]}
        pairs = (
            (
                arms[s["arm"]],
                arms[s["over"]],
                Ratio.from_json(s["steps"]),
                Ratio.from_json(s["seconds"]),
            )
            for s in summary.get("speedup") or ()
        )
        goal, same = summary["target"], summary.get("at_same_learning_rate")
        alone = {"at_same_learning_rate": None, "by_point": None}
        return cls(
            baseline=summary.get("baseline"),
            budget=summary["budget_steps"],
            target=Target(goal["value"], goal["chosen"]),
            arms=tuple(arms.values()),
            speedups=tuple(Speedup(*pair) for pair in pairs),
            same=cls.from_json({**summary, **same, **alone}, **more) if same else None,
            points=tuple(map(ArmResult.from_json, summary.get("by_point") or summary["arms"])),
            **more,
        )


def _without_rates(arm: ArmResult) -> dict[str, Any]:
    row = arm.to_json()
    del row["trainable_learning_rates"]
    return row


def summarize(
    records: Sequence[Record], *, baseline: str, target: float | None = None
) -> Summary:
    """Returns the statistics of a comparison.

    Each arm appears at its own best point of the grid: the one with the fewest median
    steps to the target on validation, or, where none gets there, the highest median best
    accuracy. `same` has all arms at the baseline's; it is None where there is only one, or an
    arm without it.

    Args:
      records: of finished runs; every point with the same seeds.
      baseline: the arm that the others are compared with.
      target: test accuracy to reach; by default the best that the baseline reached, as in
        Ioffe & Szegedy 2015, section 4.2.2: at its most accurate point, the median over
        seeds (the lower one, so that half of its runs do reach it) of each run's best.
    """
    grid = _group(records)
    goal = _target(grid[baseline], target)
    budget = records[0].steps[-1]
    points = {
        arm: {point: _result(arm, point, runs, goal) for point, runs in points.items()}
        for arm, points in grid.items()
    }
    best = {arm: _best(points, goal) for arm, points in grid.items()}
    arms = {
        arm: dataclasses.replace(
            points[arm][point], trainable_learning_rates=_trainable(points[arm], point)
        )
        for arm, point in best.items()
    }
    same, at = None, _at_same(grid, best[baseline], goal)
    if at:
        results = {arm: points[arm][point] for arm, point in at.items()}
        speedups = _speedups(grid, results, baseline, goal)
        chosen = tuple(results.values())
        same = Summary(baseline, budget, goal, chosen, speedups, None, chosen)
    every = itertools.chain.from_iterable(own.values() for own in points.values())
    speedups = _speedups(grid, arms, baseline, goal)
    return Summary(baseline, budget, goal, tuple(arms.values()), speedups, same, tuple(every))


Runs = list[Record]  # of one point, by seed


def _group(records: Sequence[Record]) -> dict[str, dict[Point, Runs]]:
    """{arm: {point: its runs by seed}}, in the order of the records."""
    groups: dict[str, dict[Point, Runs]] = {}
    for r in records:
        groups.setdefault(r.arm, {}).setdefault(r.point, []).append(r)
    for runs in itertools.chain.from_iterable(points.values() for points in groups.values()):
        runs.sort(key=lambda r: r.seed)
    return groups


def _target(points: Mapping[Point, Runs], given: float | None) -> Target:
    if given is not None:
        return Target(given, "given", given)

    def typical_best(runs, metric):
        return statistics.median_low(r.best(metric) for r in runs)

    runs = max(points.values(), key=lambda runs: typical_best(runs, "validation_accuracy"))
    own, validation = (typical_best(runs, f"{s}_accuracy") for s in ("test", "validation"))
    return Target(own, "best of the baseline", validation)


def _best(points: Mapping[Point, Runs], goal: Target) -> Point:
    def order(point):
        runs = points[point]
        needed = median(_steps(runs, "validation_accuracy", goal.validation))
        accuracy = statistics.median(r.best("validation_accuracy") for r in runs)
        return (float("inf") if needed is None else needed, -accuracy)

    return min(points, key=order)


def _at_same(grid, base: Point, goal: Target) -> dict[str, Point] | None:
    """All arms at the baseline's rate and initial scale; None where there are no others."""
    points = itertools.chain.from_iterable(grid.values())
    if len({point[:2] for point in points}) == 1:
        return None
    like = {
        arm: {p: runs for p, runs in points.items() if p[:2] == base[:2]}
        for arm, points in grid.items()
    }
    if not all(like.values()):  # an arm has rates of its own
        return None
    return {arm: _best(points, goal) for arm, points in like.items()}


def _result(arm: str, point: Point, runs: Runs, goal: Target) -> ArmResult:
    steps = _steps(runs, "test_accuracy", goal.value)
    final = [r.final() for r in runs]
    return ArmResult(
        arm,
        *point,
        seeds=len(runs),
        reached=sum(s is not None for s in steps),
        steps_to_target=estimate(steps),
        seconds_to_target=estimate(_seconds(runs, steps)),
        max_accuracy=estimate([r.best() for r in runs]),
        final_accuracy=estimate(final),
        trains=statistics.median(final) >= TRAINS * goal.value,
        diverged=sum(r.diverged_at is not None for r in runs),
    )


def _trainable(points: Mapping[Point, ArmResult], best: Point) -> tuple[float, float] | None:
    """Smallest and largest learning rate that trains, all else as at the arm's best."""
    rates = [p.learning_rate for p, own in points.items() if p[1:] == best[1:] and own.trains]
    return (min(rates), max(rates)) if rates else None


def _speedups(
    grid: Mapping[str, Mapping[Point, Runs]],
    chosen: Mapping[str, ArmResult],
    baseline: str,
    goal: Target,
) -> tuple[Speedup, ...]:
    over = chosen[baseline]
    base = grid[baseline][over.point]
    return tuple(
        Speedup(own, over, *_ratios(base, grid[arm][own.point], goal))
        for arm, own in chosen.items()
        if arm != baseline
    )


def _ratios(base: Runs, runs: Runs, goal: Target) -> tuple[Ratio, Ratio]:
    # Where the seeds differ those that both have.
    common = {r.seed for r in base} & {r.seed for r in runs}
    base, runs = ([r for r in some if r.seed in common] for some in (base, runs))
    if not common:
        return Ratio(None, (None, None)), Ratio(None, (None, None))
    base_steps, steps = (_steps(r, "test_accuracy", goal.value) for r in (base, runs))
    budget = [r.steps[-1] for r in base]
    seconds = _seconds(base, base_steps), _seconds(runs, steps), _seconds(base, budget)
    return ratio(base_steps, steps, budget), ratio(*seconds)


def _steps(runs: Runs, metric: str, target: float | None) -> list[int | None]:
    assert target is not None
    return [steps_to_target(r.steps, getattr(r, metric), target) for r in runs]


def _seconds(runs: Runs, steps: Sequence[float | None]) -> list[float | None]:
    return [
        None if s is None else s * r.seconds.per_step for r, s in zip(runs, steps, strict=True)
    ]
