"""A case with a true value, and what a framework answers to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.defects.peers import FRAMEWORKS, installed, load

Value = float | str
ALL = tuple(FRAMEWORKS)
MASKED = tuple(name for name in ALL if hasattr(FRAMEWORKS[name], "as_mask"))
SYNCED = tuple(name for name in ALL if hasattr(FRAMEWORKS[name], "replicas"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One number, or one refusal, to be had from every framework.

    Attributes:
      number: "D6a".
      title: a few words.
      measured: what the value is, in a line.
      true: the right value; "error" for what is to be refused.
      tolerance: how far a number may be from it.
      measure: for each framework that has the feature, what its value is; a word may be
        followed by ": " and more.
      raises: an exception is an answer; in other cases it is a fault of the measurement.
      or_refused: an exception is a right answer as well.
      ours: how bn_jax is used, where that is not the layer as it comes; and
      default: what the layer as it comes gives then.
    """

    number: str
    title: str
    measured: str
    true: Value
    tolerance: float
    measure: dict[str, Callable[[], Value]]
    raises: bool = False
    or_refused: bool = False
    ours: str = ""
    default: Callable[[], Value] | None = None

    def is_right(self, value: Value) -> bool:
        """Whether it is the true value, to the tolerance, or the same word."""
        if value == "error" and self.or_refused:
            return True
        if isinstance(value, str) or isinstance(self.true, str):
            return bool(value == self.true)
        return bool(abs(value - self.true) <= self.tolerance)


class Answer(NamedTuple):
    """What a framework gives, and whether that is right.

    Attributes:
      value: a finite number; or "NaN", "inf", "error", "silent" (for what should have been
        refused) or a dtype.
      right: see `Case.is_right`.
      detail: the type of the error, or what was accepted without one.
    """

    value: Value
    right: bool
    detail: str | None = None


def answer(case: Case, framework: str) -> Answer | None:
    """What the framework gives; None where it lacks the feature or is not installed.

    JAX's settings are its defaults meanwhile, whatever they are outside.

    Raises:
      Exception: what the framework raises, unless an exception is an answer to this case.
    """
    if framework not in case.measure or not installed(framework):
        return None
    load(framework)
    return _judged(case, case.measure[framework])


def by_default(case: Case) -> Answer | None:
    """What bn_jax's layer gives as it comes, where `answer` uses bn_jax in another way."""
    return case.default and _judged(case, case.default)


def _judged(case, measure):

    with jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        try:
            value, detail = _plain(measure())
        except Exception as e:
            if not case.raises:
                raise
            value, detail = "error", type(e).__name__
    return Answer(value, case.is_right(value), detail)


def each(
    measure: Callable[[Any], Value], names: Sequence[str] = ALL
) -> dict[str, Callable[[], Value]]:
    """One measurement, a function of the adapter, for each of the frameworks."""
    return {name: lambda name=name: measure(FRAMEWORKS[name]) for name in names}


def normal(*shape: int, mean: float = 0.0, std: float = 1.0, seed: int = 0) -> np.ndarray:
    """float32 numbers from a normal distribution."""
    return np.random.default_rng(seed).normal(mean, std, shape).astype(np.float32)


def first(v: Any) -> float:
    """The first element: feature 0 of a statistic."""
    return float(np.ravel(v)[0])


def _plain(value):
    """The value, of which JSON has no NaN, and what follows its first word."""
    if isinstance(value, str):
        value, _, detail = value.partition(": ")
        return value, detail or None
    if math.isfinite(value):
        return float(value), None
    return "NaN" if math.isnan(value) else "inf", None
