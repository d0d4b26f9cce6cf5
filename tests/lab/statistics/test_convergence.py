import numpy as np
import pytest

from bn_jax.lab.statistics.convergence import (
    estimate,
    median,
    median_interval,
    speedup,
    steps_to_target,
)


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ([0.1, 0.5, 0.9, 0.95], 0.9, 20),
        ([0.1, 0.95, 0.2, 0.95], 0.9, 10),  # the first time counts, a relapse does not
        ([0.9, 0.9, 0.9, 0.9], 0.9, 0),
        ([0.1, 0.5, 0.8, 0.89], 0.9, None),
        ([0.1, None, None, None], 0.9, None),  # diverged before it got there
        ([0.1, 0.92, None, None], 0.9, 10),  # diverged afterwards
    ],
)
def test_steps_to_target(values, target, expected):
    assert steps_to_target([0, 10, 20, 30], values, target) == expected


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ([72, 60, None], 72),
        ([72, 60, None, None], None),  # half did not reach
        ([72, 60, 80, None], 76),
        ([None], None),
        ([5], 5),
        ([None, None, 1], None),
    ],
)
def test_median_counts_a_run_that_did_not_reach_as_infinite(needed, expected):
    assert median(needed) == expected


def test_interval_of_equal_runs_is_a_point():
    assert median_interval([40] * 5) == [40, 40]


def test_interval_is_open_where_resamples_do_not_reach():
    assert estimate([10, 20, 30, None, None]) == (30, (10, None), 5)


def test_interval_covers_the_median_as_often_as_it_says():
    # 200 samples of 15 from a distribution of median 0; the percentile bootstrap of a
    # median is known to be near its nominal 95 % there.
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.normal(size=15).tolist()) for _ in range(200)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.89 <= covered <= 0.995


def test_speedup_of_proportional_runs_is_exact():
    # Paired by seed: every resample has the same ratio.
    assert speedup([30, 60, 90], [10, 20, 30]) == (3.0, [3.0, 3.0])


@pytest.mark.parametrize(
    ("base", "arm"), [([None, None, 3], [1, 1, 1]), ([3, 3, 3], [None, None, 1])]
)
def test_speedup_without_a_median_is_none(base, arm):
    assert speedup(base, arm)[0] is None


def test_speedup_is_open_above_where_the_base_may_not_reach():
    ratio, (low, high) = speedup([30, 40, 50, None, None], [10] * 5)
    assert ratio == 5.0
    assert low == pytest.approx(3.0)
    assert high is None


def test_speedup_where_neither_reaches_knows_nothing():
    assert speedup([None] * 3, [None] * 3) == (None, [0.0, None])


def test_speedup_of_unpaired_runs_is_refused():
    with pytest.raises(ValueError, match="3 runs of one arm and 2"):
        speedup([1, 2, 3], [1, 2])
