"""Inception: the paper's settings, and a tiny run of all that it shows."""

import dataclasses
import functools
import io
import json
import os
from contextlib import redirect_stdout

import jax
import numpy as np
import pytest
from docstrings import commands

from bn_jax.data import batch_indices
from bn_jax.errors import UserError
from bn_jax.models import Inception
from experiments import compare, ensemble, figure_3, inception
from experiments.arms import build_run, load_data


def test_the_settings_are_those_of_the_source():
    config = inception.Config()
    assert config.arms == (
        "inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid",
    )  # fmt: skip
    assert (config.learning_rates, config.batch_size) == ((0.0015,), 32)
    assert (config.optimizer, config.dropout, config.ensemble) == ("sgd_momentum", 0.4, 6)
    # 4 % every 8 epochs of 1,281,167 images, over 6 million steps of 32.
    epochs = 6e6 * 32 / 1_281_167
    np.testing.assert_allclose(config.decay_rate**3, 0.96 ** (epochs / 8), rtol=0.01)


def test_the_changes_of_section_4_2_1():
    config = inception.Config()
    arms = inception.arms(config)
    own = {name: arm.config(config) for name, arm in arms.items()}
    for name in ("inception", "bn_baseline", "inception_sigmoid"):
        assert own[name].learning_rates == (0.0015,)
        assert (own[name].dropout, own[name].augment) == (0.4, ("shift", "flip", "distort"))
    for name in ("bn_x5", "bn_x30", "bn_x5_sigmoid"):
        assert (own[name].dropout, own[name].augment) == (0, ("shift", "flip"))
        assert own[name].l2 == config.l2 / 5
        np.testing.assert_allclose(own[name].decay_rate, config.decay_rate**6)
        assert not arms[name].model.get("local_response_norm")
    rates = {name: config.learning_rates[0] for name, config in own.items()}
    np.testing.assert_allclose([rates["bn_x5"], rates["bn_x30"]], [0.0075, 0.045])
    np.testing.assert_allclose(rates["inception_x5"], 0.0075)
    assert own["inception_x5"].dropout == 0.4
    activations = {name for name, config in own.items() if config.activation == "sigmoid"}
    assert activations == {"bn_x5_sigmoid", "inception_sigmoid"}
    norms = {name for name in config.arms if arms[name].norm}
    assert norms == set(config.arms) - {"inception"}
    assert arms["inception"].model["local_response_norm"]
    assert arms["bn_baseline"].model == arms["inception"].model


def test_local_response_normalisation_is_a_flag():
    def names(config):
        known = inception.arms(config).items()
        return {name for name, arm in known if arm.model.get("local_response_norm")}

    original = {"inception", "inception_x5", "inception_sigmoid", "bn_baseline"}
    assert names(inception.Config()) == original
    everyone = inception.Config(local_response_norm=True)
    assert names(everyone) == set(inception.arms(everyone))
    assert names(inception.Config(local_response_norm=False)) == set()


def test_shuffling_is_a_flag():
    for shuffle in (True, False):
        config = inception.Config(shuffle=shuffle)
        members = (arm for arm, _ in inception.members(config).values())
        assert {a.shuffle for a in (*inception.arms(config).values(), *members)} == {shuffle}
    assert inception.Config().shuffle


def test_an_arm_without_shuffling_has_the_first_epoch_again_and_again():
    config = compare.Config(train_examples=100, batch_size=32, features=(2,))
    dataset = load_data(config)

    def order(shuffle):
        run = build_run(config, compare.Arm(None, shuffle=shuffle), dataset)
        return run.batches(jax.random.key(3), 0, 6)  # 3 batches in an epoch

    expected = batch_indices(jax.random.key(3), 0, 6, 100, 32)
    np.testing.assert_array_equal(order(True), expected)
    np.testing.assert_array_equal(order(False), np.tile(expected[:3], (2, 1)))


def test_the_papers_network_and_training_are_a_command():
    (config,) = commands(inception)
    arms = inception.arms(config)
    assert Inception(**arms["bn_x30"].model) == Inception()
    assert Inception(**arms["inception"].model) == Inception(local_response_norm=True)
    # 4 % every 8 epochs, in x5 and x30 6 times as fast.
    batches = 8 * 1_281_167 // config.batch_size
    assert abs(config.decay_steps - batches) < 2
    own = arms["bn_x30"].config(config)
    assert (config.decay_rate, own.decay_rate) == (0.96, 0.96**6)
    assert config.steps == 1e6 * figure_3.PUBLISHED["inception"][0]


def test_images_too_small_for_the_stem_are_refused():
    (config,) = commands(inception)
    config = dataclasses.replace(config, dataset="digits")
    arm = inception.arms(config)["bn_x5"]
    message = "images of 8x8 are too small for stem='imagenet'.*32x32: choose larger images"
    with pytest.raises(UserError, match=message):
        build_run(config, arm, load_data(config))


def test_the_network_is_the_narrow_one():
    arm = inception.arms(inception.Config())["bn"]
    model = Inception(10, norm=arm.norm, **arm.model)
    init = functools.partial(model.init, train=False)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    params = jax.eval_shape(init, jax.random.key(0), image)["params"]
    assert sum(v.size for v in jax.tree.leaves(params)) == 287_946


def test_the_networks_of_the_ensemble():
    config = inception.Config(seed=3)
    members = inception.members(config)
    seeds = {arm.config(config).dropout: list(seeds) for arm, seeds in members.values()}
    assert seeds == {0.05: [3, 5, 7], 0.1: [4, 6, 8]}
    for arm, _ in members.values():
        assert arm.model["per_activation_last"]
        assert arm.config(config).init_scales == (1.5,)
        np.testing.assert_allclose(arm.config(config).learning_rates, 0.045)
    assert len(inception.members(inception.Config(ensemble=1))) == 1


def test_parameters():
    row = inception.parameter_row()
    assert (row["here"], row["source"], row["agrees"]) == ("11.2M", "13.6M", False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Summary, output, folder."""
    folder = tmp_path_factory.mktemp("inception") / "w"
    config = inception.Config(
        quick=True, arms=("inception",), blocks=("3c",), width=0.03125, batch_size=8,
        steps=4, eval_every=2, train_examples=16, ensemble=1, workdir=str(folder),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as written:
        summary = inception.run(config)
    return summary, written.getvalue(), folder


def test_what_it_leaves(finished):
    summary, written, folder = finished
    assert "ensemble.png" in os.listdir(folder / "figures")
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "Beside the published numbers" in (folder / "report.html").read_text()
    assert written.rstrip().endswith("report.html")


def test_the_rows_of_a_run(finished):
    summary, _, _ = finished
    row, network, parameters, one, all_ = summary["published"]
    assert network["source"] == "1, 10, imagenet, 224x224"
    assert network["here"].endswith("small, 8x8")
    assert row["source"] == "31.0M, 72.2"
    assert parameters["source"] == "13.6M"
    assert (one["source"], all_["source"]) == ("21.99, 5.82", "20.1, 4.9")
    # Of one network the mean is the network, and no better.
    assert one["here"] == all_["here"]
    assert all_["agrees"] is False


def summary(**arms):
    """Of arms with (best, steps to the target, diverged); the first is the baseline."""
    (name, (best, base, _)), *others = arms.items()
    return {
        "target": {"value": best},
        "arms": [
            {
                "arm": arm, "seeds": 1, "diverged": diverged,
                "steps_to_target": {"median": steps, "ci95": [steps, steps]},
                "max_accuracy": {"median": best, "ci95": [best, best]},
            }
            for arm, (best, steps, diverged) in arms.items()
        ],
        "speedup": [
            {"arm": arm, "over": name, "steps": {"ratio": steps and base / steps, "ci95": None}}
            for arm, (_, steps, _) in others
        ],
    }  # fmt: skip


def test_the_published_numbers():
    base = {"inception": (0.6, 1000, 0)}
    x5, x30 = {"bn_x5": (0.6, 500, 0)}, {"bn_x30": (0.7, 100, 0)}
    sources = [r["source"] for r in figure_3.rows(summary(**base, **x5, **x30), 0.1)]
    assert sources == ["31.0M, 72.2", "2.1M, 73.0", "2.7M, 74.8", "14.8", "11.5"]


def agrees(**arms):
    base = {"inception": (0.6, 1000, 0)}
    return [row["agrees"] for row in figure_3.rows(summary(**base, **arms), 0.1)]


def test_directions_are_compared():
    assert agrees(bn_x5=(0.7, 100, 0)) == [None, True, True]
    assert agrees(bn_x5=(0.5, None, 0)) == [None, False, False]
    assert agrees(bn_x30=(0.61, 2000, 0)) == [None, True, False]
    assert agrees(bn_x5_sigmoid=(0.5, None, 0)) == [None, True]
    assert agrees(bn_x5_sigmoid=(0.7, 100, 0)) == [None, False]
    assert agrees(inception_x5=(0.7, 100, 0)) == [None, False]
    assert agrees(inception_x5=(0.1, None, 1)) == [None, True]
    assert agrees(inception_sigmoid=(0.11, None, 0)) == [None, True]
    assert agrees(inception_sigmoid=(0.4, None, 0)) == [None, False]
    assert agrees(layer=(0.4, None, 0)) == [None, None]


def test_nothing_is_compared_over_another_baseline():
    rows = list(figure_3.rows(summary(bn_x5=(0.6, 500, 0), bn_x30=(0.7, 100, 0)), 0.1))
    assert [row["agrees"] for row in rows] == [None, None]


def test_errors_and_the_mean_of_probabilities():
    labels = np.array([0, 1, 2, 6])
    probabilities = np.tile([0.3, 0.2, 0.15, 0.13, 0.12, 0.06, 0.04], (4, 1))
    assert ensemble.errors(probabilities, labels) == (0.75, 0.25)
    one, all_ = ensemble.rows([(0.5, 0.2), (0.3, 0.1), (0.4, 0.1)], (0.35, 0.1))
    assert (one["here"], all_["here"]) == ("40.0, 10.0", "35.0, 10.0")
    assert (one["agrees"], all_["agrees"]) == (None, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble": -1}, "--ensemble=-1: it must be at least 0"),
        ({"width": 0.0}, "--width=0.0: it must be positive"),
        ({"ensemble_scale": float("inf")}, "--ensemble_scale=inf: it must be positive"),
    ],
)
def test_flags_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        inception.Config(**changes)
