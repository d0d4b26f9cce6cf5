"""What a run is: a point of the grid, and how long it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bn_jax.errors import UserError


class Point(NamedTuple):
    """One point of the grid; momentum is None for a network without running statistics."""

    learning_rate: float
    init_scale: float = 1.0
    momentum: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Point:
        """That of a record, or of an arm of a summary."""
        return cls(*(row[field] for field in cls._fields))


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
