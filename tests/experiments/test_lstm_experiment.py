"""The LSTM: the source's settings, and a tiny run of all that it shows."""

import dataclasses
import io
import json
import os
from contextlib import redirect_stdout

import pytest
from docstrings import commands

from bn_jax.errors import UserError
from bn_jax.linen import BatchNorm
from bn_jax.training.run import Swept
from experiments import lstm
from experiments.arms import build_run, load_data
from experiments.compare import Config as Compare


def test_the_settings_are_those_of_the_source():
    config = lstm.Config()
    assert (config.dataset, config.features, config.batch_size) == ("mnist", (100,), 100)
    assert (config.optimizer, config.learning_rates, config.clip) == ("rmsprop", (1e-3,), 1)
    assert config.validation_fraction * 60_000 == 10_000
    assert lstm.Config(quick=True).dataset == "digits"


def test_the_sizes_of_both_sources_are_a_command_each():
    tutorial, full = commands(lstm)
    assert (tutorial.arms, tutorial.features) == (("none", "lstm_bn"), (32,))
    assert (full.read, full.steps, full.features) == ("pixels", lstm.STEPS, (100,))
    assert full.steps * full.batch_size == 200 * 50_000 == 200 * full.eval_every * 100
    assert not any((full.train_examples, full.test_examples, full.permuted, full.quick))


def test_the_network_of_the_tutorial():
    config = dataclasses.replace(commands(lstm)[0], dataset="digits")
    run = build_run(config, lstm.arms(config)["lstm_bn"], load_data(config))
    model = run.model(Swept())
    assert (model.features, model.places, model.norm.func) == (32, ("output",), BatchNorm)


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
    faster = rows["steps of none over those of recurrent_.1"]
    assert (faster["source"], faster["agrees"]) == ("above 1 (pixels)", None)


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
    *_, faster = lstm.rows(lstm.Config(read="pixels"), measured, {})
    assert faster["agrees"] is agrees
    *_, faster = lstm.rows(lstm.Config(read="rows"), measured, {})
    assert faster["agrees"] is None


@pytest.mark.parametrize(("steps", "expected"), [(100_000, [True, False]), (200, [None] * 2)])
def test_accuracies_are_held_against_the_source_at_its_size_alone(steps, expected):
    config = lstm.Config(read="pixels", permuted=True, steps=steps)
    rows = list(lstm.rows(config, summary(0.902, 0.99, 0.5), {}))
    assert [row["source"] for row in rows[:2]] == ["90.2", "95.4"]
    assert [row["agrees"] for row in rows] == [*expected, False]


def gradients(read, **first):
    """Rows of arms whose gradient, 1 at the last step, is so much at the first."""
    norms = {arm: {"start": [norm, 5.0, 1.0]} for arm, norm in first.items()}
    return list(lstm.rows(lstm.Config(read=read), summary(0.5, 0.5, 2.0), norms))[3:]


@pytest.mark.parametrize(
    ("small", "large", "agrees"),
    [
        (0.5, 1e-6, [True, True]),
        (3.71, 9.8e6, [True, False]),
        (0.11, 0.09, [True, True]),
        (20.0, 0.5, [False, False]),  # one may be nearer 1 than the other, and not near
        (1e-3, 1e-2, [False, True]),
        (0.5, None, [True, None]),
    ],
)
def test_what_the_gradient_loses(small, large, agrees):
    first = {"recurrent_.1": small, "recurrent_1": large, "none": 0.5}
    found = gradients("pixels", **first)
    assert [row["agrees"] for row in found] == [*agrees, None]
    small, _, none = (row["quantity"] for row in found)
    assert small.endswith("before training (agrees: 0.1 to 10)")
    assert none.endswith("before training")
    assert [row["agrees"] for row in gradients("rows", **first)] == [None] * 3


def test_only_of_a_gradient_that_grows_it_is_said_that_it_does():
    found = gradients("pixels", **{"recurrent_.1": 1e-3, "recurrent_1": 0.5})
    assert [row["reason"] for row in found] == [None, None]
    (grown,) = gradients("pixels", recurrent_1=4.54)
    assert "grows instead" in grown["reason"]


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
