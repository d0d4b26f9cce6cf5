"""The circles: the published settings, and a tiny run of all that it shows."""

import io
import json
import os
from contextlib import redirect_stdout

import numpy as np
import pytest

from bn_jax.report import regions
from experiments import circles


def test_the_settings_are_those_of_the_source():
    config = circles.Config()
    assert (config.dataset, config.features, config.activation) == ("circles", (50,), "relu")
    assert (config.optimizer, config.learning_rates) == ("sgd_momentum", (0.01,))
    assert (config.batch_size, config.seeds, config.target) == (32, 100, 0.8)
    # 100 epochs over all 500 points, as they are, the last 20 of an epoch left out.
    assert (config.steps, config.eval_every, config.validation_fraction) == (1500, 15, 0)
    assert config.scaling == "raw"
    assert circles.Config(quick=True).seeds == 10
    assert circles.Config(quick=True, seeds=3).seeds == 3


def test_the_arms():
    from flax.linen import BatchNorm as Flax

    arms = circles.arms()
    assert set(circles.Config().arms) <= set(arms)
    norm = arms["bn_no_affine"].norm()
    assert (norm.use_scale, norm.use_bias) == (False, False)
    assert arms["bn_before"].changes == {"places": ("before",)}
    assert arms["bn_input"].changes == {"places": ("input",)}
    assert arms["bn_momentum_0"].config(circles.Config()).momentums == (0.0,)
    assert arms["bn"].norm().epsilon == Flax().epsilon


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Summary, output, folder, arguments of the figure."""
    folder = tmp_path_factory.mktemp("circles") / "w"
    config = circles.Config(
        seeds=2, steps=30, features=(4,), arms=("none", "bn_before", "bn_momentum_0"),
        workdir=str(folder),
    )  # fmt: skip
    shown, draw = [], regions.decision_regions
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as written:
        patch.setattr(regions, "decision_regions", lambda *a: shown.extend(a) or draw(*a))
        summary = circles.run(config)
    return summary, written.getvalue(), folder, shown


def test_what_it_leaves(finished):
    summary, written, folder, _ = finished
    assert "decision_regions.png" in os.listdir(folder / "figures")
    assert json.loads((folder / "summary.json").read_text()) == summary
    page = (folder / "report.html").read_text()
    assert "Beside the published numbers" in page
    assert "The data, and decision regions" in page
    assert ".838 / .846" in written
    assert written.rstrip().endswith("report.html")


def test_the_data_are_shown_as_the_source_splits_them(finished):
    from sklearn.datasets import make_circles

    points, labels = make_circles(1000, noise=0.1, random_state=1)
    _, side, *splits = finished[3]
    for i, (own, classes) in enumerate(splits):
        where = slice(500 * i, 500 * (i + 1))
        np.testing.assert_allclose(own, points[where], rtol=1e-6)
        np.testing.assert_array_equal(classes, labels[where])
    assert side[0] < points.min()
    assert side[-1] > points.max()


def test_the_published_numbers_stand_beside_ours(finished):
    summary, *_ = finished
    rows = {row["quantity"]: row for row in summary["published"]}
    assert len(rows) == 7
    assert rows["none: accuracy, training / test"]["source"] == ".838 / .846"
    assert rows["bn_momentum_0: epochs to 80%"]["source"] is None
    assert "not reached" in rows["none: epochs to 80%"]["here"]
    setting = rows["distribution of initial weights"]
    assert (setting["here"], setting["source"]) == ("normal", "uniform")
    assert "agrees" not in setting
    # Of another width and length than the source's.
    assert all(row.get("agrees") is None for row in summary["published"])


@pytest.mark.parametrize(
    ("flags", "epochs", "agrees"),
    [({}, "20 [20, 20]", True), ({"batch_size": 64, "steps": 705}, "43 [43, 43]", None)],
)
def test_epochs_are_those_of_the_run(flags, epochs, agrees):
    from bn_jax.data import load

    arm = {
        "arm": "bn", "seeds": 10, "reached": 10,
        "steps_to_target": {"median": 300, "ci95": [300, 300]},
    }  # fmt: skip
    summary = {"arms": [arm], "target": {"value": 0.8}}
    record = {"arm": "bn", "validation_accuracy": [0.846], "test_accuracy": [0.848]}
    config, dataset = circles.Config(**flags), load("circles", validation_fraction=0)
    training = circles.compare.Training(config, dataset, {}, [record], summary)
    accuracy, to_target, _ = circles.rows(training)
    assert to_target["here"].startswith(epochs)
    assert (accuracy["agrees"], to_target["agrees"]) == (agrees, agrees)


def test_the_momentum_is_the_arms_own(finished):
    summary, *_ = finished
    momentums = {arm["arm"]: arm["momentum"] for arm in summary["arms"]}
    assert momentums == {"none": None, "bn_before": 0.99, "bn_momentum_0": 0.0}
    assert summary["at_same_learning_rate"] is None
