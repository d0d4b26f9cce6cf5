"""Section 4.1: the published settings, and a tiny run of all that it shows."""

import io
import json
import os
from contextlib import redirect_stdout

import pytest

from experiments import mnist_sigmoid
from experiments.mnist_sigmoid import Config, above, is_the_sources, reason


def test_the_settings_are_those_of_the_source():
    config = Config()
    assert (config.dataset, config.scaling, config.model) == ("mnist", "binary", "mlp")
    assert (config.features, config.activation) == ((100, 100, 100), "sigmoid")
    assert (config.arms, config.places) == (("none", "bn"), ("before",))
    assert (config.batch_size, config.steps, config.seeds) == (60, 50_000, 5)
    assert (config.dropout, config.l2, config.weight_decay) == (None, 0, 0)
    assert is_the_sources(config)


@pytest.mark.parametrize(
    "change", [{"dataset": "digits"}, {"steps": 500}, {"features": (50,)}, {"seeds": 1}]
)
def test_runs_of_another_setting_judge_no_claim(change):
    assert not is_the_sources(Config(**change))


def test_quick_is_on_digits():
    assert Config(quick=True).dataset == "digits"
    assert Config(quick=True, dataset="digits", steps=60).steps == 60


@pytest.mark.parametrize("change", [{"model": "cnn"}, {"features": None}])
def test_a_network_without_such_units_is_refused(change):
    with pytest.raises(ValueError, match="the units that are watched are of an mlp"):
        Config(**change)


@pytest.mark.parametrize(
    ("low", "expected"), [(2.1, True), (2.0, False), (0.5, False), (None, True)]
)
def test_a_claim_needs_the_whole_interval(low, expected):
    assert above({"ratio": 3.0, "ci95": [low, 4.0]}, 2) is expected


def block(ratio, rate, scale=1.0):
    return {
        "arms": [{"learning_rate": rate, "init_scale": scale}],
        "times_smaller": [{"ratio": ratio, "ci95": [None, None]}],
    }


@pytest.mark.parametrize(
    ("by_rate", "found"),
    [
        ([(1.76, 0.1), (1.03, 3.0), (1.22, 1.0)],
         ", and the ratio depends on it: 1.76 at rate 0.1, 1.03 at rate 3"),
        ([(0.8, 0.1, 2.0), (None, 1.0), (2.5, 3.0)],
         ", and the ratio depends on it: 2.5 at rate 3, 0.8 at rate 0.1, scale 2"),
        ([(1.1, 0.1)], ""),
    ],
)  # fmt: skip
def test_the_reason_is_read_off_the_run(by_rate, found):
    drift = {"by_rate": [block(*one) for one in by_rate]}
    assert reason(drift, 1) == f"The paper does not state its learning rate{found}."


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Summary, output, folder; judged as if it were of the source's size."""
    folder = tmp_path_factory.mktemp("mnist_sigmoid") / "w"
    config = Config(
        quick=True, features=(6,), seeds=2, steps=60, eval_every=20, workdir=str(folder),
        learning_rates=(0.3, 1e4),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as written:
        patch.setattr(mnist_sigmoid, "SETTING", {})
        summary = mnist_sigmoid.run(config)
    return summary, written.getvalue(), folder


def test_what_it_leaves(finished):
    summary, written, folder = finished
    assert {"typical_unit.png", "all_units.png"} <= set(os.listdir(folder / "figures"))
    kept = json.loads((folder / "summary.json").read_text())
    assert kept == json.loads(json.dumps(summary))
    page = (folder / "report.html").read_text()
    assert "Input of a typical unit" in page
    assert "Inputs of all units" in page
    assert "much more stable" in written
    assert written.rstrip().endswith("report.html")


def test_the_claims_stand_beside_ours(finished):
    summary, _, _ = finished
    rows = {
        row["quantity"].partition(": ")[2].partition(",")[0]: row
        for row in summary["published"]
    }
    accuracy, drift = rows["last test accuracy (%)"], rows["drift"]
    assert accuracy["source"] == "higher with BN"
    assert drift["source"] == "much more stable with BN"
    (ratio,) = summary["drift"]["times_smaller"]
    assert drift["agrees"] is (ratio["ci95"][0] > 2)
    assert f"{ratio['ratio']:.3g}" in drift["here"]
    assert drift["reason"] == reason(summary["drift"], 1)
    assert accuracy["reason"] is None


def test_drift_is_there_for_every_rate(finished):
    summary, _, _ = finished
    drift = summary["drift"]
    assert drift["images"] == 450
    rates = [[arm["learning_rate"] for arm in row["arms"]] for row in drift["by_rate"]]
    assert rates == [[0.3, 0.3], [1e4, 1e4]]
    for arm, best in zip(drift["arms"], summary["arms"], strict=True):
        assert (arm["arm"], arm["learning_rate"]) == (best["arm"], best["learning_rate"])
        assert arm["median"] > 0
