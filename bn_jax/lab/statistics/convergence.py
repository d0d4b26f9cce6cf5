"""How many steps a run needs, over runs of which some never get there.

A run that did not reach the target is `None`, and counts as one that needs infinitely
many steps: it is never dropped, and never averaged in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000

Needed = Sequence[float | None]
Interval = tuple[float | None, float | None]


class Estimate(NamedTuple):
    """A median over runs, and its 95 % interval; `median` and `ci95` of `summary.json`.

    Attributes:
      median: None where half of the runs or more have no such number.
      ci95: its ends, None where one is infinite.
      seeds: how many runs.
    """

    median: float | None = None
    ci95: Interval = (None, None)
    seeds: int = 1

    @property
    def interval(self) -> Interval | None:
        """The interval; None for one run, whose bootstrap has no width."""
        return self.ci95 if self.seeds > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Returns an entry of `summary.json`."""
        return {"median": self.median, "ci95": list(self.ci95)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None, seeds: int) -> Estimate:
        """Reads what `to_json` returned; None is an estimate without a median."""
        if not value:
            return cls(seeds=seeds)
        low, high = value.get("ci95") or (None, None)
        return cls(value.get("median"), (low, high), seeds)


class Ratio(NamedTuple):
    """A baseline's median over an arm's.

    Attributes:
      ratio: None where either median is missing or 0.
      ci95: the ends of its 95 % interval; None where one is infinite.
      at_least: a bound where only the baseline's median is missing.
    """

    ratio: float | None
    ci95: Interval
    at_least: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns an entry of `summary.json`."""
        found: dict[str, Any] = {"ratio": self.ratio, "ci95": list(self.ci95)}
        return found if self.at_least is None else found | {"at_least": self.at_least}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ratio:
        """Reads what `to_json` returned."""
        low, high = value["ci95"]
        return cls(value.get("ratio"), (low, high), value.get("at_least"))


def steps_to_target(
    steps: Sequence[int], values: Sequence[float | None], target: float
) -> int | None:
    """The first of `steps` whose value is at least the target, or None.

    Args:
      steps: of the evaluations, ascending.
      values: at those steps; None where the run had diverged.
      target: accuracy to reach.
    """
    reached = (s for s, v in zip(steps, values, strict=True) if v is not None and v >= target)
    return next(reached, None)


def median(needed: Needed) -> float | None:
    """The median over runs; None where half of them or more did not reach."""
    return _number(np.median(_with_infinities(needed)))


def median_interval(needed: Needed) -> list[float | None]:
    """95 % interval of the median over runs: percentile bootstrap, 10,000 resamples.

    An end is None where it lies among the runs that did not reach.
    """
    values = _with_infinities(needed)
    medians = _resampled_medians(tuple(values))
    return _percentiles(medians, medians)


def estimate(needed: Needed) -> Estimate:
    """Returns the median over runs with its interval."""
    low, high = median_interval(needed)
    return Estimate(median(needed), (low, high), len(needed))


def ratio(base: Needed, arm: Needed, budget: Needed) -> Ratio:
    """Returns the speed-up; or, where only the base did not reach, what it is at the least.

    Args:
      base, arm: as in `speedup`.
      budget: of every run of the base.
    """
    value, (low, high) = speedup(base, arm)
    at_least, needed, most = None, median(arm), median(budget)
    if median(base) is None and needed and most:
        at_least = most / needed
    return Ratio(value, (low, high), at_least)


def mean_interval(values: Sequence[float]) -> list[float]:
    """95 % interval of the mean over runs: percentile bootstrap, 10,000 resamples."""
    means = np.asarray(values, np.float64)[_resamples(len(values))].mean(1)
    return np.quantile(means, (0.025, 0.975)).tolist()


def speedup(base: Needed, arm: Needed) -> tuple[float | None, list[float | None]]:
    """median(base) / median(arm), and its 95 % interval.

    The two belong to the same seeds in the same order, which are resampled together: runs
    of one seed share their data order and initial weights.

    Returns:
      (ratio, [low, high]); the ratio is None where either median is, an end where it is
      infinite. Resamples in which neither side reaches widen the interval on both ends.
    """
    a, b = _with_infinities(base), _with_infinities(arm)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} runs of one arm and {len(b)} of the other")
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = _resampled_medians(tuple(a)) / _resampled_medians(tuple(b))
    unknown = np.isnan(ratios)
    ends = _percentiles(np.where(unknown, 0, ratios), np.where(unknown, np.inf, ratios))
    over, under = median(base), median(arm)
    return (None if over is None or not under else over / under), ends


# A summary asks for the same ones several times: of a point, of the best one, of a ratio.
@functools.lru_cache(maxsize=64)
def _resampled_medians(values):
    # A sort in double precision takes a quarter of np.median's time.
    n = len(values)
    drawn = np.sort(np.array(values)[_resamples(n)], axis=1)
    return (drawn[:, (n - 1) // 2] + drawn[:, n // 2]) / 2


@functools.lru_cache(maxsize=1)
def _resamples(n):
    rows = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    rows.flags.writeable = False
    return rows


def _percentiles(for_low, for_high):
    # No interpolation: between a number and infinity there is nothing to interpolate.
    low = np.quantile(for_low, 0.025, method="lower")
    high = np.quantile(for_high, 0.975, method="higher")
    return [_number(low), _number(high)]


def _with_infinities(needed):
    return np.array([np.inf if v is None else v for v in needed], np.float64)


def _number(v):
    return float(v) if np.isfinite(v) else None
