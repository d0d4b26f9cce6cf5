"""Where a training is: what a checkpoint holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from bn_jax.training.state import TrainState
from experiments.streaming import State


@dataclasses.dataclass
class Position:
    """Where a training is, beside its state; what JSON can hold.

    Attributes:
      step: steps that were done.
      history: of the evaluations so far.
      bad: broken images that were met, of all processes, each counted once.
      test_bad: broken images of the test set.
      skipped, diverged_at: of the state, when it was last looked at.
      seconds: spent on each.
      ended: whether nothing is left to do.
    """

    step: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bad: int = 0
    test_bad: int = 0
    skipped: int = 0
    diverged_at: int = -1
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"training": 0.0, "evaluation": 0.0}
    )
    ended: bool = False


def evaluations(config: Any) -> list[int]:
    """The steps after which there is one."""
    return [*range(0, config.steps, config.eval_every), config.steps]


def to_tree(state: State) -> dict[str, Any]:
    """A state as it is saved: parameters and statistics where `experiments.fold` finds them."""
    return state.train._asdict() | {"rest": state[1:]}


def from_tree(tree: dict[str, Any]) -> State:
    """The state of `to_tree`."""
    train = {name: tree[name] for name in TrainState._fields}
    return State(TrainState(**train), *tree["rest"])
