"""A comparison with the words that tables, sentences and figures have for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bn_jax.lab.report.text import number, percent, subject, whole
from bn_jax.lab.statistics import ArmResult, Summary


@dataclasses.dataclass(frozen=True)
class Outcome(Summary):
    """A `Summary`, its `subject`, "digits, mlp", and the name of the metric."""

    subject: str = ""
    measure: str = "accuracy"

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Outcome:
        """Returns the comparison in the content of a `summary.json`."""
        measure = summary.get("measure", "accuracy")
        return cls.from_json(summary, subject=subject(summary), measure=measure)

    @property
    def is_accuracy(self) -> bool:
        """Whether the metric is the accuracy, which is told in per cent."""
        return self.measure == "accuracy"

    @property
    def times(self) -> float:
        """What the metric is multiplied by where it is told."""
        return 100 if self.is_accuracy else 1

    @property
    def unit(self) -> str:
        """ "accuracy (%)"."""
        return "accuracy (%)" if self.is_accuracy else self.measure

    def value(self, metric: float) -> str:
        """ "97.1", or three digits of another metric."""
        return percent(metric) if self.is_accuracy else number(metric)

    @property
    def rates(self) -> list[float]:
        """The learning rates of the grid, ascending."""
        return self.values("learning_rate")

    def values(self, coordinate: str) -> list[float]:
        """What a coordinate takes on the grid, ascending, each once, without None."""
        return sorted({getattr(p, coordinate) for p in self.points} - {None})

    def along_rates(self, best: ArmResult) -> list[ArmResult]:
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
        return self.is_accuracy and any(
            (arm.max_accuracy.median or 0) > 0.85 for arm in self.arms
        )

    @property
    def scales_vary(self) -> bool:
        """Whether the grid has several initial scales."""
        return len(self.values("init_scale")) > 1

    def others(self, arm: ArmResult) -> list[str]:
        """ "scale 2" and "momentum 0.9", each where the grid varies it."""
        return [
            f"{name} {number(value)}"
            for name, key, value in (
                ("scale", "init_scale", arm.init_scale), ("momentum", "momentum", arm.momentum)
            )
            if value is not None and len(self.values(key)) > 1
        ]  # fmt: skip

    def label(self, arm: ArmResult) -> str:
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
        chosen = self.target.chosen
        chosen += f", {self.baseline}" if self.baseline and "baseline" in chosen else ""
        sign = " %" if self.is_accuracy else ""
        level = f"{self.times * self.target.value:.4g}{sign}"
        return f"test {self.measure} {level} ({chosen})"

    @property
    def headline(self) -> str:
        """ "digits, mlp. Target: test accuracy 95 % (given), within 1,500 steps"."""
        return f"{self.subject}. Target: {self.goal}, within {whole(self.budget)} steps"
