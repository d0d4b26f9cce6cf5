import numpy as np
import pytest

from bn_jax.measure import Point, summarize
from bn_jax.measure.drift import drift, drift_summary, typical_unit

STEPS = [0, 10, 20]


def paths(middle, spread=1.0):
    """One unit whose median goes along `middle`, the others `spread` apart, `[T, 3, 1]`."""
    middle, half = np.asarray(middle, float), np.asarray(spread) / 2 * np.ones(len(middle))
    return np.stack([middle - half, middle, middle + half], 1)[..., None]


def test_what_stays_does_not_drift():
    assert drift(paths([3.0] * 5)) == 0


@pytest.mark.parametrize("evaluations", [200, 3000])
def test_a_steady_climb_is_that_of_a_uniform_distribution(evaluations):
    # Of length 6 over a distance of 2; however often one looks.
    climb = paths(np.linspace(0, 6, evaluations), 2.0)
    assert drift(climb)[0] == pytest.approx(6 / np.sqrt(12) / 2, rel=0.01)


def test_it_is_the_same_in_other_units():
    wandering = paths([1.0, 4.0, 2.0, 8.0], [1.0, 2.0, 1.5, 3.0])
    np.testing.assert_allclose(drift(7 * wandering - 100), drift(wandering))


def test_what_widens_about_its_median_drifts():
    # Two of three percentiles go from -1 to -3 and from 1 to 3: variance 1 each.
    widening = paths([0.0, 0.0], [2.0, 6.0])
    assert drift(widening)[0] == pytest.approx(np.sqrt(2 / 3) / 4)


def test_what_is_the_same_for_all_examples_drifts_without_end():
    assert drift(paths([1.0, 2.0], 0.0)) == np.inf


def test_the_typical_unit_has_the_median_drift():
    assert typical_unit(np.array([5.0, 1.0, 3.0])) == 2
    assert typical_unit(np.array([5.0, 1.0, 3.0, 4.0])) == 2
    assert typical_unit(np.array([np.inf, np.inf, 1.0])) == 0


def record(arm, rate, seed, **more):
    accuracies = [0.1, 0.5, 0.9 if (arm == "bn") == (rate == 1) else 0.8]
    return {
        "arm": arm, "learning_rate": rate, "init_scale": 1.0, "momentum": None, "seed": seed,
        "steps": STEPS, "test_accuracy": accuracies, "validation_accuracy": accuracies,
        "diverged_at": None, "seconds": {"per_step": 1.0}, **more,
    }  # fmt: skip


def test_the_drift_of_a_comparison():
    """none is best at rate .1, where bn drifts as much; bn at 1, with a quarter of that."""
    records = [record(a, r, s) for a in ("none", "bn") for r in (0.1, 1) for s in range(3)]
    amount = {("none", 0.1): 4.0, ("none", 1): 8.0, ("bn", 0.1): 4.0, ("bn", 1): 1.0}
    # The drift of a step from 0 to d is d / 2; of the two other units it is far from that.
    seen = {
        (arm, Point(rate), seed): np.concatenate(
            [paths([0, d * (1 + seed)]) for d in (0.0, 2 * amount[arm, rate], 1e3)], 2
        )
        for arm, rate in amount
        for seed in range(3)
    }
    summary = summarize(records, baseline="none")
    result = drift_summary(records, summary, seen)
    none, bn = result["arms"]
    assert (none["learning_rate"], none["median"]) == (0.1, 8)
    assert none["ci95"] == [4, 12]
    assert (bn["learning_rate"], bn["median"]) == (1, 2)
    (ratio,) = result["times_smaller"]
    assert ratio == {"arm": "bn", "over": "none", "ratio": 4, "ci95": [4, 4]}
    rates = {row["arms"][0]["learning_rate"]: row for row in result["by_rate"]}
    ratios = {rate: row["times_smaller"][0]["ratio"] for rate, row in rates.items()}
    assert ratios == {0.1: 1, 1: 8}

    # Frozen where it diverged, and so without any drift.
    records[0]["diverged_at"] = records[1]["diverged_at"] = 15
    seen["none", Point(0.1), 0] = seen["none", Point(0.1), 1] = paths([1.0] * 2)
    lost = drift_summary(records, summary, seen)
    assert lost["arms"][0]["median"] is None
    assert lost["times_smaller"][0]["ratio"] is None
