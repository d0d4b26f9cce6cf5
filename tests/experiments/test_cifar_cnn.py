"""The two CIFAR-10 networks: the published settings, and a tiny run of all that it shows."""

import dataclasses
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.data import Dataset, Split
from bn_jax.errors import UserError
from bn_jax.report.epochs import epoch_curves
from bn_jax.training.schedules import schedule
from experiments import cifar_cnn, compare
from experiments.arms import build_run, in_steps

IMAGES = Split(jnp.zeros((50_000, 32, 32, 3), jnp.uint8), jnp.zeros(50_000, jnp.int32))
CIFAR = Dataset(*[IMAGES] * 3, 10, jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))


def test_the_settings_of_network_a():
    config = cifar_cnn.Config()
    assert (config.dataset, config.model, config.features) == ("cifar10", "cifar_a", None)
    assert (config.optimizer, config.schedule) == ("adam", "constant")
    assert (config.batch_size, config.epochs, config.patience) == (256, 300, 5)
    assert (config.scaling, config.places, config.augment) == ("unit", ("after",), ())
    assert config.is_whole
    assert in_steps(config, CIFAR).steps == 300 * 195
    assert in_steps(config, CIFAR).eval_every == 195


def test_the_settings_of_network_b():
    config = cifar_cnn.Config(network="b")
    assert (config.dataset, config.model, config.features) == ("cifar10", "cifar_b", None)
    assert (config.optimizer, config.learning_rates) == ("rmsprop", (1e-4,))
    assert (config.batch_size, config.epochs, config.patience) == (32, 50, None)
    assert (config.places, config.augment) == (("before",), ("shift", "flip"))
    factor = schedule(
        config.schedule, 78_100, decay_steps=config.decay_steps, decay_rate=config.decay_rate
    )
    assert factor(100_000) == pytest.approx(1 / 1.1)  # Keras: rate / (1 + 1e-6 t)


def test_with_batch_norm_network_b_is_trained_otherwise():
    for given, own in (((1e-4,), (1e-3,)), ((3e-4, 1e-3), (3e-3, 1e-2))):
        config = cifar_cnn.Config(network="b", learning_rates=given)
        arms = cifar_cnn.arms(config)
        assert arms["none"].config(config) == config
        bn = arms["bn"].config(config)
        assert (bn.dropout, bn.learning_rates) == (0, own)
        assert dataclasses.replace(bn, dropout=None, learning_rates=given) == config
    config = cifar_cnn.Config()
    assert all(arm.config(config) == config for arm in cifar_cnn.arms(config).values())


def test_a_flag_that_is_given_stands():
    config = cifar_cnn.Config(quick=True, dataset="cifar10", epochs=3)
    assert (config.dataset, config.epochs, config.batch_size) == ("cifar10", 3, 32)
    assert cifar_cnn.Config(quick=True).dataset == "digits"
    assert cifar_cnn.Config(network="b", augment=()).augment == ()
    with pytest.raises(UserError, match="--network=c: choose from a, b"):
        cifar_cnn.Config(network="c")


def test_the_parameters_of_network_a_are_those_published():
    config = cifar_cnn.Config(arms=("bn",))
    one = build_run(config, cifar_cnn.arms(config)["bn"], CIFAR)
    training = SimpleNamespace(config=config, dataset=CIFAR, runs={"bn": one})
    (row,) = cifar_cnn.counts(training)
    assert row["here"] == "1,404,970 + 1,920 = 1,406,890"
    assert row["agrees"]


@pytest.mark.parametrize(
    ("accuracy", "flags", "agrees"),
    [(0.88, {}, True), (0.84, {}, False), (0.88, {"epochs": 2}, None)],
)
def test_an_accuracy_agrees_within_two_points_at_full_size(accuracy, flags, agrees):
    config = dataclasses.replace(cifar_cnn.Config(network="b", **flags), eval_every=1)
    arm = {"arm": "bn", "learning_rate": 1e-3, "init_scale": 1.0, "momentum": 0.99}
    run = arm | {"steps": [0, 1, 2], "stopped_at": None}
    run |= {"validation_accuracy": [0.1, 0.5, 0.4]}
    summary = {"arms": [arm | {"max_accuracy": {"median": accuracy}}]}
    training = SimpleNamespace(config=config, dataset=CIFAR, summary=summary, records=[run])
    best, epochs = cifar_cnn.accuracies(training)
    assert (best["source"], best["agrees"]) == ("87%", agrees)
    assert best["here"].startswith(f"{accuracy:.1%}")
    assert ("2 epochs" in best["here"]) == (agrees is None)
    assert epochs["here"] == "2, 1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Summary, output, folder."""
    folder = tmp_path_factory.mktemp("cifar") / "w"
    config = cifar_cnn.Config(
        network="b", dataset="digits", features=(2, 4), train_examples=70, epochs=2,
        workdir=str(folder),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as written, redirect_stderr(io.StringIO()):
        summary = cifar_cnn.run(config)
    return summary, written.getvalue(), folder


def test_what_it_leaves(finished):
    summary, written, folder = finished
    assert (folder / "figures/epochs.png").exists()
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "Loss and accuracy by epoch" in (folder / "report.html").read_text()
    assert "about the same" in written
    assert [row.get("agrees") for row in summary["published"]] == [None] * 8
    assert {a["arm"]: a["learning_rate"] for a in summary["arms"]} == {"none": 1e-4, "bn": 1e-3}


def test_an_epoch_is_all_examples_but_those_left_over(finished):
    _, _, folder = finished
    for line in (folder / "records.jsonl").read_text().splitlines():
        assert json.loads(line)["steps"] == [0, 2, 4]  # 70 examples, batches of 32
    config = json.loads((folder / "config.json").read_text())
    assert (config["flags"]["steps"], config["flags"]["eval_every"]) == (4, 2)
    assert "--epochs=2" in config["command"]
    assert "--steps" not in config["command"]


def test_the_layers_are_printed_with_their_counts(finished):
    _, written, _ = finished
    conv = 9 * 2 + 9 * 2 * 2  # no bias before a BatchNorm
    trained = conv + 2 * 4 + 3 * 3 * 2 * 4 + 2 * 4 + (4 * 10 + 10)
    kept = 2 * (2 + 2 + 4)
    line = f"bn: {trained} parameters, {kept} running statistics, {trained + kept} in all"
    assert line in written
    assert "Conv_1" in written
    assert "\x1b" not in written


def test_curves_end_where_a_run_stopped():
    point = {"learning_rate": 0.1, "init_scale": 1.0, "momentum": None}
    run = point | {
        "arm": "none", "steps": [0, 10, 20, 30, 40], "stopped_at": 20,
        "train_loss": [None, 2.0, 1.0, None, None],
        "train_accuracy": [None, 0.2, 0.3, None, None],
        "validation_loss": [2.3, 2.1, 1.5, 2.1, 2.1],
        "validation_accuracy": [0.1, 0.4, 0.35, 0.4, 0.4], "seconds": {"per_step": 0.5},
    }  # fmt: skip
    figure = epoch_curves([run], {"arms": [{"arm": "none", **point}]}, 10)
    loss, loss_by_time, accuracy, _ = (
        {line.get_label(): line.get_xydata() for line in ax.lines} for ax in figure.axes
    )
    np.testing.assert_allclose(loss["none, validation"], [[1, 2.1], [2, 1.5]])
    np.testing.assert_allclose(loss["none, training"], [[1, 2], [2, 1]])
    np.testing.assert_allclose(loss_by_time["none, training"], [[5, 2], [10, 1]])
    np.testing.assert_allclose(accuracy["none, validation"], [[1, 40], [2, 35]])


def test_progress_counts_epochs():
    from experiments.watchers import note

    report = {"train_loss": 0.5, "validation_accuracy": 0.25, "diverged_at": -1}
    evaluation = SimpleNamespace(
        step=30, report={k: np.full((1, 1), v) for k, v in report.items()}
    )
    assert note(evaluation, 10) == "epoch 3, loss 0.5, validation accuracy 25.0%"
    assert note(evaluation) == "step 30, loss 0.5, validation accuracy 25.0%"


def test_epochs_are_counted_with_the_batch_size():
    config = compare.Config(epochs=2, batch_size=1000)
    assert (in_steps(config, CIFAR).steps, in_steps(config, CIFAR).eval_every) == (100, 50)
    assert in_steps(compare.Config(), CIFAR) == compare.Config()
    with pytest.raises(UserError, match="--epochs=0"):
        compare.Config(epochs=0)
