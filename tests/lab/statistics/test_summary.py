import json

import pytest

from bn_jax.lab.statistics import Record, Seconds
from bn_jax.lab.statistics import summarize as summarized

STEPS = [0, 10, 20, 30]


def record(arm, rate, seed, test, validation=None, per_step=0.5, **more):
    losses = {f"{s}_loss": [1.0] * len(STEPS) for s in ("train", "validation", "test")}
    given = {"momentum": None, "diverged_at": None} | more
    return Record(
        arm=arm, learning_rate=rate, init_scale=1.0, seed=seed, steps=STEPS, test_accuracy=test,
        validation_accuracy=validation or test, train_accuracy=test, **losses,
        seconds=Seconds(per_step), **given,
    )  # fmt: skip


def summarize(records, **given):
    """As `summary.json` has it, from what `from_json` makes of that."""
    summary = summarized(records, **given)
    found = json.loads(json.dumps(summary.to_json()))
    assert type(summary).from_json(found).to_json() == summary.to_json() | found
    return found


def slow(best=0.8):
    return [0.1, 0.4, 0.6, best]


def fast(best=0.9):
    return [0.1, 0.8, 0.85, best]


@pytest.fixture
def records():
    return [
        *(record("none", 0.1, s, slow()) for s in range(3)),
        *(record("none", 0.5, s, slow(0.5)) for s in range(3)),
        *(record("bn", 0.1, s, slow(), per_step=1.0) for s in range(3)),
        *(record("bn", 0.5, s, fast(), per_step=1.0) for s in range(3)),
    ]


def only(rows, **wanted):
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return row


def test_target_is_by_default_the_best_of_the_baseline(records):
    summary = summarize(records, baseline="none")
    assert summary["target"] == {
        "metric": "test_accuracy",
        "value": 0.8,
        "chosen": "best of the baseline",
    }
    none, bn = only(summary["arms"], arm="none"), only(summary["arms"], arm="bn")
    assert (none["learning_rate"], bn["learning_rate"]) == (0.1, 0.5)
    assert none["steps_to_target"] == {"median": 30, "ci95": [30, 30]}
    assert bn["steps_to_target"] == {"median": 10, "ci95": [10, 10]}
    assert none["seconds_to_target"]["median"] == 15
    assert bn["seconds_to_target"]["median"] == 10


def test_speedups_at_the_best_and_at_the_same_learning_rate(records):
    summary = summarize(records, baseline="none")
    (best,) = summary["speedup"]
    assert (best["arm"], best["over"]) == ("bn", "none")
    assert best["steps"]["ratio"] == pytest.approx(3)
    assert best["seconds"]["ratio"] == pytest.approx(1.5)
    same = summary["at_same_learning_rate"]
    assert same["learning_rate"] == 0.1
    assert same["speedup"][0]["steps"]["ratio"] == 1


def test_half_of_the_baseline_reaches_its_own_best_with_an_even_number_of_seeds():
    runs = [record("none", 0.1, s, slow(b)) for s, b in enumerate([0.7, 0.75, 0.8, 0.85])]
    none = summarize(runs, baseline="none")["arms"][0]
    assert none["reached"] == 3
    assert none["steps_to_target"]["median"] == 30


def test_rates_are_chosen_on_validation_and_reported_on_test():
    runs = [
        *(record("none", 0.1, s, test=slow(), validation=fast()) for s in range(3)),
        *(record("none", 0.5, s, test=fast(), validation=slow()) for s in range(3)),
    ]
    summary = summarize(runs, baseline="none", target=0.8)
    assert summary["arms"][0]["learning_rate"] == 0.1
    assert summary["arms"][0]["steps_to_target"]["median"] == 30


def test_unreached_and_diverged_runs_are_counted():
    lost = [0.1, None, None, None]
    runs = [
        record("none", 0.1, 0, slow()),
        record("none", 0.1, 1, lost, diverged_at=4),
        record("none", 0.1, 2, lost, diverged_at=7),
        *(record("bn", 0.1, s, fast()) for s in range(3)),
    ]
    summary = summarize(runs, baseline="none", target=0.75)
    none = only(summary["arms"], arm="none")
    assert (none["seeds"], none["reached"], none["diverged"]) == (3, 1, 2)
    assert none["steps_to_target"] == {"median": None, "ci95": [30, None]}
    assert not none["trains"]
    assert none["trainable_learning_rates"] is None
    (speedup,) = summary["speedup"]
    assert speedup["steps"]["ratio"] is None
    assert speedup["steps"]["at_least"] == 3  # 30 steps were not enough, 10 were


def test_all_diverged_has_an_answer():
    lost = [None] * 4
    runs = [record(a, 0.1, s, lost, diverged_at=0) for a in ("none", "bn") for s in range(2)]
    summary = summarize(runs, baseline="none", target=0.5)
    assert [a["reached"] for a in summary["arms"]] == [0, 0]
    assert summary["speedup"][0]["steps"]["ratio"] is None


def test_trainable_rates_span_those_that_end_near_the_target():
    ends = {0.01: 0.3, 0.1: 0.8, 1.0: 0.73, 10.0: 0.71}
    runs = [record("none", r, s, slow(b)) for r, b in ends.items() for s in range(3)]
    none = summarize(runs, baseline="none")["arms"][0]
    assert none["trainable_learning_rates"] == [0.1, 1.0]  # 90 % of .8 is .72


def test_every_point_is_listed_once(records):
    rows = summarize(records, baseline="none")["by_point"]
    assert [(r["arm"], r["learning_rate"]) for r in rows] == [
        ("none", 0.1), ("none", 0.5), ("bn", 0.1), ("bn", 0.5),
    ]  # fmt: skip


def test_momenta_at_the_same_rate_are_chosen_on_validation():
    runs = [
        *(record("none", 0.1, s, slow()) for s in range(3)),
        *(record("bn", 0.1, s, slow(), momentum=0.99) for s in range(3)),
        *(record("bn", 0.1, s, fast(), momentum=0.9) for s in range(3)),
    ]
    runs += [record("none", 0.5, s, slow()) for s in range(3)]
    summary = summarize(runs, baseline="none")
    assert only(summary["at_same_learning_rate"]["arms"], arm="bn")["momentum"] == 0.9


def test_one_rate_is_not_compared_twice():
    runs = [record(arm, 0.1, s, slow()) for arm in ("none", "bn") for s in range(3)]
    assert summarize(runs, baseline="none")["at_same_learning_rate"] is None


def test_arms_with_rates_of_their_own_are_not_compared_at_one():
    runs = [record("none", 0.1, s, slow()) for s in range(3)]
    runs += [record("bn", 1.0, s, fast()) for s in range(3)]
    summary = summarize(runs, baseline="none")
    assert summary["at_same_learning_rate"] is None
    assert [a["learning_rate"] for a in summary["arms"]] == [0.1, 1.0]
