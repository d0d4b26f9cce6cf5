"""How far rates and scales go: the settings, what is read off a grid, and a tiny run."""

import io
import json
import os
from contextlib import redirect_stdout

import pytest

from bn_jax.errors import UserError
from experiments import learning_rates
from experiments.learning_rates import Network


def test_the_settings():
    config = learning_rates.Config()
    assert config.depths == (3, 5, 10, 20)
    assert config.activations == ("relu", "sigmoid", "tanh")
    assert config.arms == ("none", "bn")
    assert learning_rates.Config(quick=True).depths == (3, 10)


def test_every_combination_is_an_arm_of_equal_layers():
    config = learning_rates.Config(arms=("bn", "layer"), depths=(1, 4), width=7)
    arms = learning_rates.arms(config)
    assert len(arms) == 2 * 3 * 2
    arm = arms["layer tanh 4"]
    assert arm.model["features"] == (7, 7, 7, 7)
    assert arm.config(config).activation == "tanh"
    assert arm.norm.__name__ == "LayerNorm"


def point(network, rate, scale, trains):
    return {
        "arm": network.name, "learning_rate": rate, "init_scale": scale, "trains": trains
    }  # fmt: skip


def test_what_is_read_off_the_grid():
    config = learning_rates.Config(init_scales=(0.1, 1.0, 4.0))
    network = Network("bn", "relu", 3)
    points = [
        point(network, 0.1, 1.0, True), point(network, 1.0, 1.0, True),
        point(network, 10.0, 1.0, False), point(network, 10.0, 4.0, True),
        point(Network("bn", "relu", 5), 10.0, 1.0, True),
    ]  # fmt: skip
    summary = {"by_point": points}
    assert learning_rates.largest_rate(config, summary, network) == 1.0
    assert learning_rates.trained_scales(summary, network) == 2
    absent = Network("none", "relu", 3)
    assert learning_rates.largest_rate(config, summary, absent) is None
    assert learning_rates.trained_scales(summary, absent) == 0


@pytest.mark.parametrize(
    ("none", "bn", "agrees"),
    [
        ((0.1, 0.1), (1.0, 10.0), True),
        ((None, 0.1), (0.1, 1.0), True),
        ((0.1, 1.0), (1.0, 1.0), False),
        ((0.1, None), (1.0, None), False),
        ((10.0, 0.1), (10.0, 1.0), None),  # both at the end of the grid: who knows
        ((10.0, 1.0), (10.0, 0.1), False),
    ],
)
def test_larger_everywhere_or_not(none, bn, agrees):
    activations = ("relu", "tanh")
    config = learning_rates.Config(
        depths=(3,), activations=activations, learning_rates=(0.1, 1.0, 10.0)
    )
    largest = {}
    for i, activation in enumerate(activations):
        largest[Network("none", activation, 3)] = none[i]
        largest[Network("bn", activation, 3)] = bn[i]
    (row,) = learning_rates.rate_rows(config, largest)
    assert row["agrees"] is agrees
    assert ("no rate" in row["here"]) == (None in none + bn)
    assert ("at least 10" in row["here"]) == (10.0 in none + bn)


def test_a_tiny_run(tmp_path):
    folder = tmp_path / "w"
    config = learning_rates.Config(
        depths=(2,), activations=("relu",), width=8, seeds=1, steps=20, eval_every=20,
        learning_rates=(0.001, 1.0), init_scales=(1.0, 3.0), target=0.5, workdir=str(folder),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as written:
        summary = learning_rates.run(config)
    assert json.loads((folder / "summary.json").read_text()) == summary
    figures = sorted(os.listdir(folder / "figures"))
    assert figures == ["accuracy.png", "captions.json", "largest_rate.png"]
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 4
    assert {r["arm"] for r in records} == {a["arm"] for a in summary["arms"]}
    assert len(summary["published"]) == 2
    # 20 steps of a thousandth are no training.
    slow = [p for p in summary["by_point"] if p["learning_rate"] == 0.001]
    assert not any(p["trains"] for p in slow)
    page = (folder / "report.html").read_text()
    assert "Largest learning rate that trains" in page
    assert "bn relu 2" in written.getvalue()
    assert written.getvalue().rstrip().endswith("report.html")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"depths": ()}, "--depths=: name one or more"),
        ({"depths": (3, 0)}, "--depths: 0 must be at least 1"),
        ({"width": 0}, "--width: 0 must be at least 1"),
        ({"activations": ("relu", "relu")}, "--activations=relu,relu"),
        ({"features": (3,)}, "--features: here --depths and --width"),
        ({"target": None}, "--target: name"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message):
        learning_rates.Config(**flags)
