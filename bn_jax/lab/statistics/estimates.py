"""Estimates with intervals that cover, and the one rule by which a claim is judged.

A run that did not reach the target is `None`. It needs more steps than the budget, so it bounds
an estimate and is never dropped. Under six seeds an interval is called a range, and nothing is
judged by it (Agarwal et al. 2021: few runs say little).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from scipy import stats

FEWEST = 6  # seeds of an interval that a claim may be judged by
LEVEL = 0.95

Steps = Sequence[float | None]
Verdict = Literal["yes", "no", "undecided"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its standard error, or a geometric mean with that of its log.

    Attributes:
      center: the mean, of the logarithms where `log`.
      error: the standard error of the center; NaN for one seed.
      seeds: how many.
      log: whether the values are positive and were averaged as logarithms.
      below, above: whether the value is not known on that side: a run that never reached the
        target counted as one of the budget, so the truth may be lower, or higher.
    """

    center: float
    error: float
    seeds: int
    log: bool = False
    below: bool = False
    above: bool = False

    @classmethod
    def of(cls, values: Sequence[float], *, log: bool = False) -> Estimate:
        """Returns the mean of one value a seed, or the geometric mean.

        Raises:
          ValueError: there is no value, or one of those to be averaged as logarithms is not
            positive.
        """
        numbers = [math.log(v) for v in values] if log else list(values)
        center = statistics.fmean(numbers)
        n = len(numbers)
        error = statistics.stdev(numbers) / math.sqrt(n) if n > 1 else math.nan
        return cls(center, error, n, log)

    @property
    def value(self) -> float:
        """The mean, or the geometric mean."""
        return math.exp(self.center) if self.log else self.center

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Returns the t interval of the mean; infinite where nothing is known.

        It covers the truth in a share `level` of cases if the values (their logarithms) are
        normal, and nearly so if they are not far from it.
        """
        lowest, half = 0.0 if self.log else -math.inf, math.inf
        if self.seeds > 1:
            half = self.error * float(stats.t.ppf((1 + level) / 2, self.seeds - 1))
        low, high = self.center - half, self.center + half
        if self.log:
            low, high = math.exp(low), math.exp(high) if high < 700 else math.inf
        return lowest if self.below else low, math.inf if self.above else high


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Returns the mean of a - b over seeds: a[i] and b[i] are of one seed.

    Raises:
      ValueError: the numbers of seeds differ.
    """
    return Estimate.of([x - y for x, y in zip(a, b, strict=True)])


def speedup(base: Steps, arm: Steps, budget: float) -> Estimate | None:
    """Returns the geometric mean over seeds of base / arm, both in steps to the target.

    A run that did not reach the target counts as one of `budget` steps. If it is of the base,
    the truth may be above the estimate; if it is of the arm, below. A step 0 counts as 1.

    Returns:
      None where no seed says anything: in each of them neither run reached the target.
    """
    if all(b is None and a is None for b, a in zip(base, arm, strict=True)):
        return None
    ratios = [_steps(b, budget) / _steps(a, budget) for b, a in zip(base, arm, strict=True)]
    return dataclasses.replace(
        Estimate.of(ratios, log=True), below=None in arm, above=None in base
    )


def _steps(steps: float | None, budget: float) -> float:
    return budget if steps is None else max(steps, 1)


class Survival(NamedTuple):
    """Two arms of which some runs never reached the target, as survival analysis has them.

    Attributes:
      ratio: restricted mean steps of the base over those of the arm: a mean of min(steps,
        budget) (Royston & Parmar 2013).
      p: of the log-rank test that both reach the target equally soon (Mantel 1966); 1 where
        none does.
    """

    ratio: float
    p: float


def survival(base: Steps, arm: Steps, budget: float) -> Survival:
    """Compares two arms by all of their runs, those that did not reach the target included."""
    means = [statistics.fmean(_steps(s, budget) for s in some) for some in (base, arm)]
    p = 1.0
    if any(s is not None for s in (*base, *arm)):
        p = float(stats.logrank(_censored(base, budget), _censored(arm, budget)).pvalue)
    return Survival(means[0] / means[1], 1.0 if math.isnan(p) else p)


def _censored(some: Steps, budget: float) -> stats.CensoredData:
    reached = [float(s) for s in some if s is not None]
    return stats.CensoredData(uncensored=reached, right=[budget] * (len(some) - len(reached)))


def share_reached(some: Steps, at: float) -> float:
    """Returns the share of runs that had reached the target after `at` steps."""
    return sum(s is not None and s <= at for s in some) / len(some)


def binomial_error(accuracy: float, examples: int) -> float:
    """Returns the standard error of an accuracy that is due to the size of the test set."""
    return math.sqrt(accuracy * (1 - accuracy) / examples)


class Claim(NamedTuple):
    """That a quantity lies in a region, from `low` to `high`."""

    estimate: Estimate | None
    low: float = -math.inf
    high: float = math.inf


def judge(claims: Sequence[Claim]) -> list[Verdict]:
    """Returns for each of an experiment's claims whether it holds.

    "yes" if the interval lies inside the claim's region, "no" if it lies outside, else
    "undecided". The intervals of k claims are wider than those of one, so that at most 5 % of
    experiments have a wrong verdict: by Holm's procedure (1979) the claim that is i-th surest
    is judged at the level 1 - .05 / (k - i + 1), if all surer ones were decided.
    """
    sides = [_side(claim) for claim in claims]
    found: list[Verdict] = ["undecided"] * len(claims)
    order = sorted(range(len(claims)), key=lambda i: sides[i][1])
    for place, i in enumerate(order):
        verdict, p = sides[i]
        if p > (1 - LEVEL) / (len(claims) - place):
            break
        found[i] = verdict
    return found


def _side(claim: Claim) -> tuple[Verdict, float]:
    """The verdict that the value suggests, and the smallest p at which the interval does."""
    estimate, low, high = claim
    if estimate is None or estimate.seeds < FEWEST:
        return "undecided", 1.0
    if estimate.log:
        low, high = (math.log(v) if v > 0 else -math.inf for v in (low, high))
    inside = low <= estimate.center <= high
    if inside:
        margins = [
            (estimate.center - low, estimate.below),
            (high - estimate.center, estimate.above),
        ]
        # A side of the region that is open is never left.
        margin = min(0.0 if unknown and m < math.inf else m for m, unknown in margins)
    elif estimate.center < low:
        margin = 0.0 if estimate.above else low - estimate.center
    else:
        margin = 0.0 if estimate.below else estimate.center - high
    if estimate.error == 0:
        return ("yes" if inside else "no"), 0.0 if margin > 0 else 1.0
    p = 2 * float(stats.t.sf(margin / estimate.error, estimate.seeds - 1))
    return ("yes" if inside else "no"), p
