"""What a run is: a point of the grid, how long it trains, and what it measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bn_jax.errors import UserError

# Over the evaluations; None once the run is no longer finite.
Series = list[float | None]


class Point(NamedTuple):
    """One point of the grid; momentum is None for a network without running statistics."""

    learning_rate: float
    init_scale: float = 1.0
    momentum: float | None = None


class Budget(NamedTuple):
    """Steps of a run, and steps between evaluations.

    With `patience` a run stops early, after so many evaluations without a higher validation
    accuracy, and goes back to where that was highest. `eval_rows` is how many examples,
    summed over the runs that are trained at once, an evaluation takes at a time. There are
    `laps` from one evaluation to the next.
    """

    steps: int
    eval_every: int
    patience: int | None = None
    # 500 runs of the circles network: 184 us a run with 1,000 examples each, 34 with 32,
    # when the activations stay in the processor's cache.
    eval_rows: int = 16_384
    laps: int = 1

    @property
    def lap(self) -> int:
        """Steps of a lap."""
        return self.eval_every // self.laps

    def check(self) -> None:
        """Raises a UserError unless evaluations divide the steps."""
        if self.steps % self.eval_every:
            raise UserError(
                f"eval_every {self.eval_every} does not divide the {self.steps} steps"
            )

    def stop(self, accuracies: Sequence[float]) -> tuple[int, int] | None:
        """The evaluation to stop after and the best one, if they say so; counted from 0."""
        if self.patience is None:
            return None
        best = 0
        for i, accuracy in enumerate(accuracies):
            if accuracy > accuracies[best]:
                best = i
            elif i - best >= self.patience:
                return i, best
        return None


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Where the time of a run went.

    Attributes:
      per_step: of training, without compilation and evaluation.
      training, evaluation: of the whole run.
      runs_at_once: how many runs were trained together: these times are a run's share.
      compilation: of all runs that were trained with it.
    """

    per_step: float
    training: float = 0.0
    evaluation: float = 0.0
    runs_at_once: int = 1
    compilation: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A run that has ended, as a line of `records.jsonl` has it.

    Attributes:
      arm, learning_rate, init_scale, momentum, seed: which run.
      steps: of the evaluations, from 0.
      train_loss, train_accuracy: means over the batches since the evaluation before.
      validation_loss, validation_accuracy, test_loss, test_accuracy: with running statistics.
        From where a run stopped early they are of the weights that it went back to.
      diverged_at: the first step whose loss was not finite, or None.
      stopped_at, restored: where a run stopped early, and the step that it went back to.
      seconds: where its time went.
    """

    arm: str
    learning_rate: float
    init_scale: float
    momentum: float | None
    seed: int
    steps: list[int]
    train_loss: Series
    train_accuracy: Series
    validation_loss: Series
    validation_accuracy: Series
    test_loss: Series
    test_accuracy: Series
    diverged_at: int | None = None
    stopped_at: int | None = None
    restored: int | None = None
    seconds: Seconds

    @property
    def point(self) -> Point:
        """The point of the grid."""
        return Point(self.learning_rate, self.init_scale, self.momentum)

    @property
    def run(self) -> tuple[str, Point, int]:
        """Arm, point and seed, which no two runs have in common."""
        return self.arm, self.point, self.seed

    def filled(self, metric: str = "test_accuracy") -> list[float]:
        """A series with 0 from where the run had diverged; or its smallest value, if less."""
        values = getattr(self, metric)
        worst = min((v for v in values if v is not None), default=0.0)
        return [min(0.0, worst) if v is None else v for v in values]

    def final(self, metric: str = "test_accuracy") -> float:
        """The last value of a filled series."""
        return self.filled(metric)[-1]

    def best(self, metric: str = "test_accuracy") -> float:
        """The largest value of a series; 0 where there is none."""
        return max((v for v in getattr(self, metric) if v is not None), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Returns the line of `records.jsonl`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Record:
        """Reads what `to_json` returned; entries that it does not know are left out.

        Raises:
          UserError: an entry is missing.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        known: dict[str, Any] = {name: v for name, v in line.items() if name in fields}
        for name, field in fields.items():
            if name not in known and field.default is dataclasses.MISSING:
                raise UserError(
                    f"a record in records.jsonl has no {name!r}: delete that line, and its run "
                    "is made again"
                )
        known["seconds"] = Seconds(**known["seconds"])
        return cls(**known)
