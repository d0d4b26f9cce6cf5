"""The LSTM: the source's settings, and a tiny run of all that it shows."""

import io
import json
import os
from contextlib import redirect_stdout

import pytest

from bn_jax.errors import UserError
from experiments import lstm
from experiments.arms import build_run, load_data
from experiments.compare import Config as Compare


def test_the_settings_are_those_of_the_source():
    config = lstm.Config()
    assert (config.dataset, config.features, config.batch_size) == ("mnist", (100,), 100)
    assert (config.optimizer, config.learning_rates, config.clip) == ("rmsprop", (1e-3,), 1)
    assert config.validation_fraction * 60_000 == 10_000
    assert lstm.Config(quick=True).dataset == "digits"


def test_the_arms():
    config = lstm.Config(read="pixels", permuted=True)
    arms = lstm.arms(config)
    assert set(config.arms) <= set(arms)
    small, large = arms["recurrent_.1"], arms["recurrent_1"]
    assert (small.model["initial_scale"], large.model["initial_scale"]) == (0.1, 1)
    assert small.config(config).places == ("recurrent",)
    assert arms["lstm_bn"].config(config).places == ("output",)
    for name in config.arms:
        assert (arms[name].model["read"], arms[name].model["permutation_seed"]) == ("pixels", 0)
    assert arms["none"].norm is None
    assert lstm.arms(lstm.Config())["none"].model["permutation_seed"] is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Summary, output, folder."""
    folder = tmp_path_factory.mktemp("lstm") / "w"
    config = lstm.Config(
        dataset="digits", features=(3,), steps=4, eval_every=2, seeds=1, batch_size=20,
        arms=("none", "recurrent_.1"), workdir=str(folder),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as written:
        summary = lstm.run(config)
    return summary, written.getvalue(), folder


def test_what_it_leaves(finished):
    summary, written, folder = finished
    assert "gradients_through_time.png" in os.listdir(folder / "figures")
    assert summary["variant"] == "rows"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "Beside the published numbers" in (folder / "report.html").read_text()
    assert written.rstrip().endswith("report.html")


def test_the_gradient_of_every_step_before_and_after(finished):
    norms = finished[0]["gradient_norms"]
    assert set(norms) == {"none", "recurrent_.1"}
    for ends in norms.values():
        assert [len(ends[end]) for end in ("start", "end")] == [8, 8]
        assert all(v > 0 for v in ends["start"])
        assert ends["start"] != ends["end"]


def test_rows_of_an_image_are_not_held_against_pixels(finished):
    rows = {row["quantity"]: row for row in finished[0]["published"]}
    assert rows["none: highest test accuracy (%)"]["source"] is None
    assert rows["steps of none over those of recurrent_.1"]["source"] == "above 1 (pixels)"


def summary(none, recurrent, steps):
    arms = [
        {"arm": arm, "max_accuracy": {"median": best, "ci95": [best, best]}}
        for arm, best in (("none", none), ("recurrent_.1", recurrent))
    ]
    ratio = {"ratio": steps, "ci95": [steps, steps]}
    return {"arms": arms, "speedup": [{"arm": "recurrent_.1", "over": "none", "steps": ratio}]}


@pytest.mark.parametrize(
    ("ratio", "ci95", "agrees"),
    [
        (2.0, [1.5, None], True),
        (1.4, [0.9, None], None),  # may be chance
        (1.4, [None, None], None),
        (1.0, [1.0, 1.0], False),
        (None, [0.0, None], False),
    ],
)
def test_faster_is_by_more_than_chance(ratio, ci95, agrees):
    measured = summary(0.5, 0.5, 2.0)
    measured["speedup"][0]["steps"] = {"ratio": ratio, "ci95": ci95}
    *_, faster = lstm.rows(lstm.Config(), measured, {})
    assert faster["agrees"] is agrees


@pytest.mark.parametrize(("steps", "expected"), [(100_000, [True, False]), (200, [None] * 2)])
def test_accuracies_are_held_against_the_source_at_its_size_alone(steps, expected):
    config = lstm.Config(read="pixels", permuted=True, steps=steps)
    rows = list(lstm.rows(config, summary(0.902, 0.99, 0.5), {}))
    assert [row["source"] for row in rows[:2]] == ["90.2", "95.4"]
    assert [row["agrees"] for row in rows] == [*expected, False]


def test_what_the_gradient_loses():
    def agrees(read, small, large):
        ends = {"recurrent_.1": small, "recurrent_1": large}
        norms = {arm: {"start": [first, 5.0, 1.0]} for arm, first in ends.items()}
        found = list(lstm.rows(lstm.Config(read=read), summary(0.5, 0.5, 2.0), norms))[3:]
        return [row["agrees"] for row in found]

    assert agrees("pixels", 0.5, 1e-6) == [True, True]
    assert agrees("pixels", 20.0, 1e9) == [True, False]
    assert agrees("pixels", 1e-3, 1e-2) == [False, False]
    assert agrees("rows", 0.5, 1e-6) == [None, None]
    assert agrees("pixels", 0.5, None) == [None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": (3, 4)}, "--model=lstm has one width"),
        ({"places": ("before",)}, "choose from output, recurrent"),
        ({"dataset": "circles"}, "an LSTM reads images"),
    ],
)
def test_flags_that_an_lstm_has_otherwise(changes, message):
    config = Compare(model="lstm", **{"dataset": "digits"} | changes)
    arm = lstm.arms(lstm.Config())["bn"]._replace(changes={})
    with pytest.raises(UserError, match=message):
        build_run(config, arm, load_data(config))


def test_a_way_of_reading_that_there_is_not():
    with pytest.raises(UserError, match="--read=words: choose from rows, pixels"):
        lstm.Config(read="words")
