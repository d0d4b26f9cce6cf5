"""Accuracy and speed against the batch size: the settings, the rules, and a tiny run."""

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout

import jax
import numpy as np
import pytest

from bn_jax.errors import UserError
from experiments import batch_size, crossed
from experiments.batch_size import Cell


def test_the_settings():
    config = batch_size.Config()
    assert config.batch_sizes == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    assert config.arms == ("none", "bn", "ghost", "renorm", "group", "layer")


# A quick run with batches of 8 has 640 steps, which is the default that --quick changes.
@pytest.mark.parametrize("flags", [{}, {"quick": True}, {"quick": True, "batch_sizes": (8,)}])
def test_every_arm_sees_as_many_examples_and_is_evaluated_as_often(flags):
    config = batch_size.Config(**flags)
    arms = batch_size.arms(config)
    for cell in batch_size.cells(config):
        own = arms[cell.name].config(config)
        assert own.batch_size == cell.batch_size
        assert own.steps * own.batch_size == config.steps * config.batch_size
        assert own.steps // own.eval_every == config.steps // config.eval_every


def test_the_steps_of_a_schedule_are_as_many_examples_too():
    config = batch_size.Config(
        arms=("none",), batch_sizes=(8, 512), schedule="step", warmup_steps=64, decay_steps=8
    )
    own = {n: arm.config(config) for n, arm in batch_size.arms(config).items()}
    steps = {n: (c.steps, c.warmup_steps, c.decay_steps) for n, c in own.items()}
    assert steps == {"none 8": (2560, 256, 32), "none 512": (40, 4, 1)}


def test_ghost_batches_are_left_out_where_they_are_the_batch():
    config = batch_size.Config(arms=("bn", "ghost"), batch_sizes=(1, 16, 32))
    names = [cell.name for cell in batch_size.cells(config)]
    assert names == ["bn 1", "bn 16", "bn 32", "ghost 32"]


def test_renormalisation_begins_at_the_share_of_the_steps_that_the_paper_has():
    layer = batch_size.norms(1300)["renorm"].norm()
    with jax.numpy_rank_promotion("allow"):
        r_max = [float(layer.r_max(count)) for count in (0, 50, 400, 1300)]
        d_max = [float(layer.d_max(count)) for count in (0, 50, 250, 1300)]
    assert (r_max, d_max) == ([1, 1, 3, 3], [0, 0, 5, 5])


def test_the_claims():
    noise = np.linspace(-0.001, 0.001, 10)
    typical = {
        Cell("bn", 32): 0.95, Cell("bn", 2): 0.6, Cell("bn", 4): 0.8,
        Cell("group", 32): 0.95, Cell("group", 2): 0.945, Cell("renorm", 4): 0.9,
    }  # fmt: skip
    accuracies = {cell: list(value + noise) for cell, value in typical.items()}
    rows = list(batch_size.rows(accuracies))
    assert [row["agrees"] for row in rows] == [True, True, True]
    assert [row["here"].split(" ")[0] for row in rows] == ["+35.0", "+0.5", "+10.0"]
    assert [row["source"].split(" ")[0] for row in rows] == ["+11.1", "+0.0", "+2.3"]
    swapped = {
        Cell("bn", 32): 0.6, Cell("bn", 2): 0.95, Cell("bn", 4): 0.9,
        Cell("group", 32): 0.95, Cell("group", 2): 0.9, Cell("renorm", 4): 0.8,
    }  # fmt: skip
    accuracies = {cell: list(value + noise) for cell, value in swapped.items()}
    assert [row["agrees"] for row in batch_size.rows(accuracies)] == [False, False, False]


def test_a_tiny_run(tmp_path):
    folder = tmp_path / "w"
    config = batch_size.Config(
        batch_sizes=(1, 256), arms=("bn", "group"), features=(8,), seeds=1, batch_size=512,
        steps=1, eval_every=1, learning_rates=(0.03, 0.1), momentums=(0.9,),
        workdir=str(folder),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        summary = batch_size.run(config)
    assert json.loads((folder / "summary.json").read_text()) == summary
    figures = sorted(os.listdir(folder / "figures"))
    assert figures == ["accuracy.png", "captions.json", "speed.png", "statistics.png"]
    assert "bn 1: refused" in err.getvalue()
    assert "refused" in out.getvalue()
    found = {(c["norm"], c["batch_size"]): c for c in summary["combinations"]}
    assert [cell for cell, c in found.items() if c["refused"]] == [("bn", 1)]
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    last = {r["arm"]: r["steps"][-1] for r in records}
    assert last == {"bn 256": 2, "group 1": 512, "group 256": 2}
    assert found["group", 1]["batch_statistics"] is None
    assert 0 <= found["bn", 256]["batch_statistics"]["median"] <= 1


def test_the_accuracy_with_the_statistics_of_batches():
    """Against a network in numpy, whose batches are cut here."""
    from bn_jax.linen import BatchNorm
    from experiments import compare
    from experiments.arms import Arm, build_run, load_data

    # Dropout is left out of it.
    config = compare.Config(features=(3,), activation="tanh", dropout=0.5)
    dataset = load_data(config)
    training = compare.Training(
        config, dataset, {"bn": build_run(config, Arm(BatchNorm), dataset)}, [], {}
    )
    rng = np.random.default_rng(0)
    first, last = rng.normal(size=(64, 3)), rng.normal(size=(3, 10))
    norm = {"scale": np.ones(3), "bias": np.zeros(3)}
    variables = jax.tree.map(
        np.float32,
        {
            "params": {
                "Dense_0": {"kernel": first},
                "BatchNorm_0": norm,
                "Dense_1": {"kernel": last, "bias": np.zeros(10)},
            },
            "batch_stats": {"BatchNorm_0": {"mean": np.full(3, 2.0), "var": np.full(3, 9.0)}},
        },
    )
    hidden = np.asarray(dataset.scaled(dataset.test.inputs), np.float64).reshape(-1, 64) @ first
    labels = np.asarray(dataset.test.labels)

    def hits(h, mean, var, labels):
        return (np.tanh((h - mean) / np.sqrt(var + 1e-5)) @ last).argmax(1) == labels

    running = crossed.accuracy(training, "bn", dataset.test)(variables)
    np.testing.assert_allclose(running, hits(hidden, 2, 9, labels).mean(), atol=1e-6)
    parts = [slice(i, i + 100) for i in range(0, 400, 100)]  # 450 examples: 50 are left over
    wanted = [hits(hidden[p], hidden[p].mean(0), hidden[p].var(0), labels[p]) for p in parts]
    batches = crossed.accuracy(training, "bn", dataset.test, 100)(variables)
    np.testing.assert_allclose(batches, np.mean(wanted), atol=1e-6)


def test_the_best_point_is_chosen_on_validation_at_the_end():
    def record(rate, seed, validation, test):
        return {
            "arm": "a", "learning_rate": rate, "init_scale": 1.0, "momentum": None,
            "seed": seed, "validation_accuracy": validation, "test_accuracy": test,
        }  # fmt: skip

    records = [
        record(0.1, 1, [0.9, 0.5], [1.0, 1.0]), record(0.1, 0, [0.9, 0.4], [1.0, 1.0]),
        record(1.0, 0, [0.1, 0.6], [0.2, 0.3]), record(1.0, 1, [0.1, 0.7], [0.2, 0.3]),
        record(10.0, 0, [0.1, None], [0.2, None]), record(10.0, 1, [0.1, 0.9], [0.2, 0.9]),
    ]  # fmt: skip
    runs = crossed.best_runs(records)["a"]
    assert [(r["learning_rate"], r["seed"]) for r in runs] == [(1.0, 0), (1.0, 1)]
    assert [crossed.final(r) for r in records[4:]] == [0.0, 0.9]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_sizes": ()}, "--batch_sizes=: name one or more"),
        ({"batch_sizes": (2, 2)}, "--batch_sizes=2,2"),
        ({"batch_sizes": (3,)}, "3 does not divide the 5120 examples"),
        ({"epochs": 3}, "--epochs: here --steps"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message):
        batch_size.Config(**flags)


def test_all_refused():
    config = batch_size.Config(
        batch_sizes=(1,), arms=("bn",), steps=1, eval_every=1, batch_size=1
    )
    with (
        redirect_stderr(io.StringIO()),
        pytest.raises(UserError, match="every arm is refused"),
    ):
        batch_size.run(config)
