"""Estimates against worked examples, and their intervals against simulated seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from bn_jax.lab.statistics.estimates import (
    Claim,
    Estimate,
    binomial_error,
    difference,
    judge,
    share_reached,
    speedup,
    survival,
)


def test_a_mean_and_its_interval_by_hand():
    # 1, 2, 3, 4, 5: mean 3, standard deviation sqrt(2.5), t(.975, 4) = 2.776445.
    found = Estimate.of([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert found.value == 3
    assert found.interval() == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_a_geometric_mean_is_that_of_the_logarithms():
    found = Estimate.of([1, 10, 100], log=True)
    half = 4.302653 * math.log(10) / math.sqrt(3)  # t(.975, 2)
    assert found.value == pytest.approx(10)
    assert found.interval() == pytest.approx((10 * math.exp(-half), 10 * math.exp(half)), 1e-5)


def test_one_seed_has_no_interval():
    assert Estimate.of([3.0]).interval() == (-math.inf, math.inf)
    assert Estimate.of([3.0], log=True).interval() == (0, math.inf)


def test_differences_are_of_one_seed():
    a, b = [0.5, 0.7, 0.9], [0.4, 0.6, 0.8]
    found = difference(a, b)
    assert found.value == pytest.approx(0.1)
    assert found.interval() == pytest.approx((0.1, 0.1))  # the seeds' own spread is in neither
    with pytest.raises(ValueError, match="shorter"):
        difference(a, b[:2])


def test_equal_arms_have_a_speedup_of_one():
    for runs in ([10, 20, 30], [10, None, 30], [0, 0, 5]):
        found = speedup(runs, runs, budget=100)
        assert found.value == 1
        assert found.interval()[0] <= 1 <= found.interval()[1]
        assert survival(runs, runs, budget=100) == (1, 1)


def test_runs_that_never_reach_bound_the_speedup():
    base, arm = [100, 200, None], [50, 50, 50]
    found = speedup(base, arm, budget=400)
    assert found.value == pytest.approx((2 * 4 * 8) ** (1 / 3))
    assert found.interval()[1] == math.inf
    low = Estimate.of([2, 4, 8], log=True).interval()[0]
    assert found.interval()[0] == pytest.approx(low)
    turned = speedup(arm, base, budget=400)
    assert turned.interval() == pytest.approx((0, 1 / low))
    assert speedup([None] * 3, [None] * 3, 400) is None
    assert speedup([None, 100, 1], [None, 50, 1], 400).interval() == (0, math.inf)


def test_survival_by_hand():
    # Events at 1, 2 (arm) and 3 (base), one of the base never within 10. Expected in the arm:
    # 2/4 + 1/3 + 0; variance 1/4 + 2/9 + 0.
    found = survival([3, None], [1, 2], budget=10)
    assert found.ratio == pytest.approx(6.5 / 1.5)
    z = (2 - (1 / 2 + 1 / 3)) / math.sqrt(1 / 4 + 2 / 9)
    assert found.p == pytest.approx(2 * stats.norm.sf(z), rel=1e-6)
    assert survival([None, None], [None, None], 10) == (1, 1)


def test_small_parts():
    runs = [10, 20, None]
    assert [share_reached(runs, at) for at in (9, 10, 20, 1e9)] == [0, 1 / 3, 2 / 3, 2 / 3]
    assert binomial_error(0.9, 100) == pytest.approx(0.03)


SURE, UNSURE = Estimate(2.0, 0.1, 10), Estimate(2.0, 1.0, 10)


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (Claim(SURE, low=1), "yes"),
        (Claim(SURE, low=3), "no"),
        (Claim(SURE, high=1), "no"),
        (Claim(SURE, 1.5, 2.5), "yes"),
        (Claim(SURE, low=1.9), "undecided"),
        (Claim(UNSURE, low=1), "undecided"),
        (Claim(UNSURE), "yes"),  # the region is everything
        (Claim(Estimate(2.0, 0.0, 10), low=1), "yes"),
        (Claim(Estimate(2.0, 0.0, 10), low=2), "undecided"),
        (Claim(Estimate(2.0, 0.1, 5), low=1), "undecided"),  # five seeds
        (Claim(None, low=1), "undecided"),
        # The truth may be above: that it is above 1 is sure, that it is below 3 is not.
        (Claim(Estimate(2.0, 0.1, 10, above=True), low=1), "yes"),
        (Claim(Estimate(2.0, 0.1, 10, above=True), high=3), "undecided"),
        (Claim(Estimate(2.0, 0.1, 10, above=True), low=3), "undecided"),
        (Claim(Estimate(2.0, 0.1, 10, above=True), high=1), "no"),
        (Claim(Estimate(2.0, 0.1, 10, below=True), low=3), "no"),
        (Claim(Estimate(math.log(4), 0.1, 10, log=True), low=2), "yes"),
        (Claim(Estimate(math.log(4), 0.1, 10, log=True), high=2), "no"),
    ],
)
def test_a_claim_is_judged_by_its_interval(claim, verdict):
    assert judge([claim]) == [verdict]


def test_many_claims_are_judged_more_strictly():
    just = Claim(Estimate(2.4, 1.0, 10), low=0)  # p = .04
    assert judge([just]) == ["yes"]
    assert judge([just, Claim(UNSURE, low=1)]) == ["undecided", "undecided"]
    assert judge([just, Claim(SURE, low=1)]) == ["yes", "yes"]  # Holm: the surer one is done


def covered(rng, seeds, spread, budget=math.inf, cases=4000):
    """The share of simulated comparisons whose interval has the true speed-up of 2."""
    hits = 0
    for _ in range(cases):
        shared = rng.normal(0, 0.3, seeds)  # data order and weights of a seed
        base = np.exp(math.log(800) + shared + rng.normal(0, spread, seeds))
        arm = np.exp(math.log(400) + shared + rng.normal(0, spread, seeds))
        runs = ([s if s <= budget else None for s in some] for some in (base, arm))
        found = speedup(*runs, budget)
        hits += found is not None and found.interval()[0] <= 2 <= found.interval()[1]
    return hits / cases


@pytest.mark.parametrize("seeds", [5, 10])
def test_intervals_cover_where_all_reach(seeds):
    share = covered(np.random.default_rng(0), seeds, spread=0.3)
    print(f"{seeds} seeds: {100 * share:.1f} % of the 95 % intervals cover")
    assert 0.93 <= share <= 0.97


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("budget", [1200, 800])
def test_bounds_hold_where_some_never_reach(seeds, budget):
    share = covered(np.random.default_rng(0), seeds, spread=0.3, budget=budget)
    print(f"{seeds} seeds, budget {budget}: {100 * share:.1f} % cover")
    assert share >= 0.93


def test_wrong_verdicts_are_rare_among_many_claims():
    """Of claims that are true at the edge of their region, at most 5 % of experiments err."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(4000):
        claims = [Claim(Estimate.of(rng.normal(0, 1, 10)), low=0) for _ in range(5)]
        wrong += any(v != "undecided" for v in judge(claims))
    assert wrong / 4000 <= 0.06
