"""A comparison of arms as `summary.json` has it, typed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bn_jax.lab.report.text import Estimate, finite, number, subject, whole

COORDINATES = ("arm", "learning_rate", "init_scale", "momentum")
ESTIMATES = ("steps_to_target", "seconds_to_target", "max_accuracy", "final_accuracy")


def same_point(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two rows (an arm of a summary, a run's record) are of one arm at one point."""
    return all(a.get(c) == b.get(c) for c in COORDINATES)


@dataclasses.dataclass(frozen=True)
class Arm:
    """The runs of an arm at one point of the grid; the fields are keys of `summary.json`."""

    arm: str
    learning_rate: float
    init_scale: float | None
    momentum: float | None
    seeds: int
    reached: int
    diverged: int
    steps_to_target: Estimate
    seconds_to_target: Estimate
    max_accuracy: Estimate
    final_accuracy: Estimate
    trains: bool
    trainable_learning_rates: tuple[float, float] | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Arm:
        """An arm from an entry of `arms` or `by_point`."""
        own: dict[str, Any] = {f.name: row.get(f.name) for f in dataclasses.fields(cls)}
        own |= {k: Estimate.of(row.get(k), row["seeds"]) for k in ESTIMATES}
        return cls(**own)

    def runs(self, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The records of the runs at this point."""
        return [record for record in records if same_point(record, vars(self))]

    @property
    def lost(self) -> bool:
        """Whether half of the runs or more diverged: no median describes the others."""
        return 2 * self.diverged >= self.seeds

    @property
    def count(self) -> str:
        """ "4 of 5": the runs that reached the target."""
        return f"{self.reached} of {self.seeds}"


class Ratio(NamedTuple):
    """A baseline's median over an arm's.

    Attributes:
      ratio: None where either median is missing or 0.
      low, high: the 95 % interval; None where an end is 0 or infinite: an arm does not reach.
      at_least: a bound where only the baseline's median is missing.
    """

    ratio: float | None
    low: float | None
    high: float | None
    at_least: float | None

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Ratio:
        """A ratio from `ratio`, `ci95` and `at_least` of `summary.json`."""
        found = (value.get("ratio"), *value["ci95"], value.get("at_least"))
        return cls(*(finite(v) or None for v in found))


class Speedup(NamedTuple):
    """An arm beside its baseline: steps and seconds to the target."""

    arm: Arm
    over: Arm
    steps: Ratio
    seconds: Ratio


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms at their best points, and at every point of the grid.

    Attributes:
      subject: "digits, mlp".
      budget: training steps of a run.
      target: test accuracy.
      chosen: where the target is from.
      arms: each at its own best point.
      speedups: of every arm but the baseline.
      points: every arm at every point; those of `arms` where there is nothing else.
      same: all arms at the baseline's rate and scale; None where that was not measured.
    """

    subject: str
    budget: int
    target: float
    chosen: str
    arms: tuple[Arm, ...]
    speedups: tuple[Speedup, ...]
    points: tuple[Arm, ...]
    same: Comparison | None

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Comparison:
        """A comparison from `summary.json`."""
        arms = {row["arm"]: Arm.of(row) for row in summary["arms"]}
        pairs = (
            (arms[s["arm"]], arms[s["over"]], Ratio.of(s["steps"]), Ratio.of(s["seconds"]))
            for s in summary.get("speedup", ())
        )
        goal, same = summary["target"], summary.get("at_same_learning_rate")
        base = f", {summary['baseline']}" if summary.get("baseline") else ""
        base = base if "baseline" in goal["chosen"] else ""
        alone = {"at_same_learning_rate": None, "by_point": None}
        return cls(
            subject(summary), summary["budget_steps"], goal["value"], goal["chosen"] + base,
            tuple(arms.values()), tuple(Speedup(*pair) for pair in pairs),
            tuple(map(Arm.of, summary.get("by_point") or summary["arms"])),
            cls.of({**summary, **same, **alone}) if same else None,
        )  # fmt: skip

    @property
    def rates(self) -> list[float]:
        """The learning rates of the grid, ascending."""
        return self.values("learning_rate")

    def values(self, coordinate: str) -> list[float]:
        """What a coordinate takes on the grid, ascending, each once, without None."""
        return sorted({getattr(p, coordinate) for p in self.points} - {None})

    def along_rates(self, best: Arm) -> list[Arm]:
        """The points of one arm at the initial scale and momentum of its best, by rate."""
        fixed = (best.arm, best.init_scale, best.momentum)
        line = [p for p in self.points if (p.arm, p.init_scale, p.momentum) == fixed]
        return sorted(line, key=lambda p: p.learning_rate)

    @property
    def has_grid(self) -> bool:
        """Whether an arm was tried at several rates or scales."""
        points = {(p.arm, p.learning_rate, p.init_scale) for p in self.points}
        return len(points) > len(self.arms)

    @property
    def near_best(self) -> bool:
        """Whether an arm comes so near 100 % that a linear axis would hide differences."""
        return any((arm.max_accuracy.median or 0) > 0.85 for arm in self.arms)

    @property
    def scales_vary(self) -> bool:
        """Whether the grid has several initial scales."""
        return len(self.values("init_scale")) > 1

    def others(self, arm: Arm) -> list[str]:
        """ "scale 2" and "momentum 0.9", each where the grid varies it."""
        return [
            f"{name} {number(value)}"
            for name, key, value in (
                ("scale", "init_scale", arm.init_scale), ("momentum", "momentum", arm.momentum)
            )
            if value is not None and len(self.values(key)) > 1
        ]  # fmt: skip

    def label(self, arm: Arm) -> str:
        """ "rate 0.1", with the initial scale and the momentum where the grid varies them."""
        return ", ".join([f"rate {number(arm.learning_rate)}", *self.others(arm)])

    @property
    def same_label(self) -> str:
        """The point of `same`, which has no common momentum."""
        arms = (self.same or self).arms
        return self.label(dataclasses.replace(arms[0], momentum=None))

    @property
    def goal(self) -> str:
        """ "test accuracy 95 % (given)"."""
        return f"test accuracy {100 * self.target:.4g} % ({self.chosen})"

    @property
    def headline(self) -> str:
        """ "digits, mlp. Target: test accuracy 95 % (given), within 1,500 steps"."""
        return f"{self.subject}. Target: {self.goal}, within {whole(self.budget)} steps"
