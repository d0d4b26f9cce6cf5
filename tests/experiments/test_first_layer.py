"""BatchNorm as the first layer: settings, arms with a scaling of their own, a tiny run."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest

from bn_jax.errors import UserError
from experiments import compare, first_layer
from experiments.arms import build_run, load_data

TINY = {"dataset": "digits", "features": (8, 4), "momentums": (0.9,)}


def test_the_network_is_that_of_the_source():
    config = first_layer.Config()
    assert (config.dataset, config.model, config.features) == ("mnist", "mlp", (300, 100))
    assert (config.scaling, config.max_runs_at_once) == ("raw", 1)
    known = first_layer.arms(config)
    assert len(config.arms) == 8
    assert set(config.arms) <= set(known)
    for name, arm in ((name, known[name].config(config)) for name in config.arms):
        assert arm.activation == ("elu" if name.endswith("_elu") else "relu")
        assert arm.scaling == ("standard" if name.startswith("standard") else "raw")
        if name.startswith("bn_"):
            assert arm.places == ("input", name.split("_")[1])
        assert (known[name].norm is not None) == name.startswith("bn_")
    assert known["none"].config(config).learning_rates == (1e-3, 3e-3, 1e-2)


def test_quick_needs_no_download_and_leaves_flags_alone():
    assert first_layer.Config(quick=True).dataset == "digits"
    assert first_layer.Config(quick=True, dataset="mnist").dataset == "mnist"


def test_an_arm_can_have_its_own_scaling():
    config = first_layer.Config(**TINY)
    dataset, known = load_data(config), first_layer.arms(config)
    raw, standard = (build_run(config, known[n], dataset) for n in ("none", "standard"))
    pixels = np.asarray(dataset.train.inputs, np.float32)
    np.testing.assert_array_equal(raw.scaled(dataset.train.inputs), pixels)
    scaled = np.asarray(standard.scaled(dataset.train.inputs), np.float64)
    everything = load_data(compare.Config(dataset="digits", validation_fraction=0)).train.inputs
    exact = (pixels - np.mean(everything)) / np.std(np.asarray(everything, np.float64))
    np.testing.assert_allclose(scaled, exact, atol=1e-5)


def test_binary_images_cannot_be_standardised():
    config = first_layer.Config(**TINY, scaling="binary", arms=("standard",))
    with pytest.raises(UserError, match="--scaling=binary: standard arms"):
        build_run(config, first_layer.arms(config)["standard"], load_data(config))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Summary, output, folder."""
    folder = tmp_path_factory.mktemp("first") / "w"
    config = first_layer.Config(
        **TINY, arms=("none", "bn_before"), seeds=1, steps=20,
        eval_every=10, learning_rates=(0.1,), raw_learning_rates=(0.01,), workdir=str(folder),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as written, redirect_stderr(io.StringIO()):
        summary = first_layer.run(config)
    return summary, written.getvalue(), folder


def test_what_it_leaves(finished):
    summary, written, folder = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "folded nothing extra" in written
    rates = {a["arm"]: a["learning_rate"] for a in summary["arms"]}
    assert rates == {"none": 0.01, "bn_before": 0.1}


def test_the_rows(finished):
    summary, _, _ = finished
    rows = {row["quantity"]: row for row in summary["published"]}
    assert all(row.get("agrees") is None for row in rows.values())  # another network
    assert "times none" in rows["bn_before: seconds per epoch"]["here"]
    assert rows["none: seconds per epoch"]["source"] is None
    predictions = [row for name, row in rows.items() if "prediction of" in name]
    assert len(predictions) == 2 * len(first_layer.BATCHES)
    (difference,) = (row["here"] for name, row in rows.items() if "difference" in name)
    assert float(difference) < 1e-4


def test_the_best_with_batch_norm_is_folded():
    """By accuracy, whatever place it has."""
    arms = [
        {"arm": name, "momentum": momentum, "max_accuracy": {"median": best}}
        for name, momentum, best in (
            ("none", None, 0.99), ("bn_before", 0.9, 0.95), ("bn_after", 0.9, 0.97),
        )
    ]  # fmt: skip
    assert first_layer.best_normed({"arms": arms})["arm"] == "bn_after"
    assert first_layer.best_normed({"arms": arms[:1]}) is None
