"""The speed run: the recipe's parts against torch and written out, and a tiny run."""

import dataclasses
import functools
import io
import json
import math
import os
from contextlib import redirect_stderr, redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.data import Split
from bn_jax.errors import UserError
from bn_jax.linen import BatchNorm
from bn_jax.models import MLP
from bn_jax.report import speedrun
from bn_jax.training.run import Run, Swept
from experiments import airbench, cifar_speedrun
from experiments.lookahead import Lookahead

# These programs run once, for milliseconds, and take seconds to optimise.
QUICKLY = {"xla_backend_optimization_level": 0}


def test_the_settings():
    config = cifar_speedrun.Config()
    assert config.is_whole
    assert (config.batch_size, config.seeds, config.target) == (1024, 20, 0.94)
    assert config.steps == math.ceil(9.9 * (50_000 // 1024))
    assert cifar_speedrun.Config(seeds=1, dtype="bfloat16").is_whole
    assert not cifar_speedrun.Config(views=1).is_whole
    quick = cifar_speedrun.Config(quick=True)
    assert not quick.is_whole
    assert quick.steps / (1347 // quick.batch_size) == pytest.approx(9.9, abs=0.05)


def test_every_arm_is_the_recipe_but_for_one_thing():
    config = cifar_speedrun.Config()
    arms = cifar_speedrun.arms(config)
    assert tuple(arms) == config.arms
    fields = {name: (arm.norm.keywords if arm.norm else None) for name, arm in arms.items()}
    recipe = {"epsilon": 1e-12, "use_scale": False, "unbiased": True}
    assert fields.pop("none") is None
    assert fields.pop("scale") == recipe | {"use_scale": True}
    assert fields.pop("ghost_32") == recipe | {"group_size": 32}
    assert fields.pop("ghost_128") == recipe | {"group_size": 128}
    assert all(given == recipe for given in fields.values())
    changed = {name: dict(arm.changes) for name, arm in arms.items() if arm.changes}
    assert changed == {
        "momentum_0.9": {"momentums": (0.9,)}, "momentum_0.99": {"momentums": (0.99,)},
        "bias_rate_1": {"bias_rate": 1.0},
        "none": {"learning_rates": (0.345, 1.15, 3.45, 11.5)},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optimizer": "adam"}, "--optimizer=adam: the recipe has its own"),
        ({"augment": ("flip",)}, "--augment.*the recipe has its own"),
        ({"epochs": 3}, "--epochs: here --steps says"),
        ({"dtype": "float16"}, "--dtype=float16: choose from float32, bfloat16"),
        ({"views": 3}, "--views=3: choose from 1, 2, 6"),
        ({"translate": -1}, "--translate=-1: it must be at least 0"),
        ({"bias_rate": 0.0}, "--bias_rate=0.0: it must be positive"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message):
        cifar_speedrun.Config(**flags)


def test_a_dataset_without_images_is_refused():
    config = cifar_speedrun.Config(dataset="circles", batch_size=10)
    with pytest.raises(UserError, match="--dataset=circles: choose one of images"):
        airbench.load(config)


def test_the_training_images_are_there_twice():
    config = cifar_speedrun.Config(quick=True)
    inputs, labels = airbench.load(config).train
    assert labels.shape == (2 * 1347,)
    np.testing.assert_array_equal(inputs[1347:], np.asarray(inputs[:1347])[:, :, ::-1])
    np.testing.assert_array_equal(labels[1347:], labels[:1347])
    assert airbench.load(config).validation.labels.shape == (1000,)
    held_out = dataclasses.replace(config, validation_fraction=0.1)
    assert airbench.load(held_out).validation.labels.shape == (135,)


def test_every_image_is_seen_mirrored_in_every_other_epoch():
    examples, per_epoch = 50, 12  # batches of 4: 2 examples are left out in an epoch

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def rows(first):
        key = jax.random.key(3)
        return airbench.alternating(key, first, per_epoch // 2, examples=examples, batch_size=4)

    found = np.concatenate([rows(first) for first in range(0, 4 * per_epoch, per_epoch // 2)])
    epochs = found.reshape(4, -1)
    mirrored = np.full((4, examples), -1)
    for epoch, seen in enumerate(epochs):
        assert len(set(seen % examples)) == per_epoch * 4
        mirrored[epoch, seen % examples] = seen // examples
    for one, other, opposite in ((0, 2, 0), (1, 3, 0), (0, 1, 1), (2, 3, 1)):
        both = (mirrored[one] >= 0) & (mirrored[other] >= 0)
        assert both.sum() > 40
        assert (mirrored[one] ^ mirrored[other])[both].tolist() == [opposite] * both.sum()
    assert 10 < mirrored[0].sum() < 40


def test_images_move_by_up_to_two_pixels_in_either_direction():
    images = np.random.default_rng(0).normal(size=(300, 5, 6, 2)).astype(np.float32)
    move = jax.jit(functools.partial(airbench.translate, 2), compiler_options=QUICKLY)
    found = np.asarray(move(jax.random.key(0), images))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    moves = [
        [(padded[n, i : i + 5, j : j + 6] == image).all() for i in range(5) for j in range(5)]
        for n, image in enumerate(found)
    ]
    assert np.sum(moves, 1).tolist() == [1] * 300
    assert np.sum(moves, 0).min() > 1  # of 12 expected


def test_the_optimizer_is_that_of_torch_with_the_sum_of_the_losses():
    """Rates, weight decay and groups as the source's code gives them to torch's SGD."""
    torch = pytest.importorskip("torch")
    rng, batch, steps, frozen_at = np.random.default_rng(0), 512, 14, 9
    params = {
        "Whitening_0": {"bias": rng.normal(size=3)}, "Conv_0": {"kernel": rng.normal(size=4)},
        "BatchNorm_0": {"bias": rng.normal(size=2)},
    }  # fmt: skip
    gradients = [jax.tree.map(lambda v: rng.normal(size=v.shape), params) for _ in range(steps)]

    kilostep = 1024 * (1 + 1 / (1 - 0.85))
    rate, decay = 11.5 / kilostep, 0.0153 * batch / kilostep
    twins = jax.tree.map(lambda v: torch.tensor(v, requires_grad=True), params)
    whitening, conv, norm = (
        twins[k][n] for k, n in
        (("Whitening_0", "bias"), ("Conv_0", "kernel"), ("BatchNorm_0", "bias"))
    )  # fmt: skip
    sgd = torch.optim.SGD(
        [
            {"params": [norm], "lr": 64 * rate, "weight_decay": decay / (64 * rate)},
            {"params": [whitening, conv], "lr": rate, "weight_decay": decay / rate},
        ],
        momentum=0.85,
        nesterov=True,
    )
    peak = int(0.23 * steps)
    factors = np.interp(np.arange(steps + 1), [0, peak, steps], [0.2, 1, 0.07])
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda i: factors[i])

    tx = airbench.optimizer(
        11.5, batch_size=batch, steps=steps, frozen_at=frozen_at, weight_decay=0.0153,
        bias_rate=64.0,
    )  # fmt: skip
    update = jax.jit(tx.update)
    ours = jax.tree.map(jnp.float32, params)
    state = tx.init(ours)
    for i, mean in enumerate(gradients):
        updates, state = update(jax.tree.map(jnp.float32, mean), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        for twin, g in zip(jax.tree.leaves(twins), jax.tree.leaves(mean), strict=True):
            twin.grad = torch.tensor(g * batch)
        whitening.grad = whitening.grad if i < frozen_at else None
        sgd.step()
        schedule.step()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.detach(), rtol=1e-4, atol=1e-5),
        ours,
        twins,
    )


def test_lookahead_is_the_loop_of_the_source():
    """Beside steps of a plain run that are averaged by hand, in float64."""
    rng = np.random.default_rng(0)
    split = Split(rng.normal(size=(40, 3)).astype(np.float32), rng.integers(4, size=40))
    steps, epoch, begin = 43, 7, 20

    def model(swept, axis_name=None):
        return MLP((5,), 4, norm=BatchNorm)

    rest = (model, optax.sgd, lambda x: x, lambda *_: None)
    plain, ours = Run(*rest), Lookahead(*rest, steps=steps, epoch=epoch, begin=begin)
    key, swept = jax.random.key(0), Swept(0.3)
    step = jax.jit(plain.step, compiler_options=QUICKLY)
    look = jax.jit(ours.step, compiler_options=QUICKLY)
    fast, found = plain.init(key, swept, split.inputs), ours.init(key, swept, split.inputs)
    slow = None

    def weights(state):
        return state.train.params, state.train.batch_stats

    def back(state):
        params, stats = jax.tree.map(jnp.float32, slow)
        return state._replace(train=state.train._replace(params=params, batch_stats=stats))

    for t in range(1, steps + 1):
        rows = rng.permutation(40)[:8]
        fast, found = step(fast, swept, split, rows), look(found, swept, split, rows)
        if t > begin and t % 5 == 0:
            now = jax.tree.map(np.float64, weights(fast))
            d = 0.95**5 * (t / steps) ** 3
            slow = now if slow is None else jax.tree.map(
                lambda s, f, d=d: d * s + (1 - d) * f, slow, now
            )  # fmt: skip
            fast = back(fast)
        if slow is not None and (t % epoch == 0 or t == steps):
            fast = back(fast)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            weights(found),
            weights(fast),
        )
    assert found.train.step == steps


def test_a_mean_with_its_interval():
    values = list(np.random.default_rng(0).normal(0.94, 0.0014, size=50))
    found = cifar_speedrun.mean(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    wide = 1.96 * np.std(values) / np.sqrt(50)
    np.testing.assert_allclose(np.array(found["ci95"]) - found["mean"], [-wide, wide], rtol=0.1)


@pytest.mark.parametrize(
    ("value", "flags", "agrees"),
    [(0.9395, {}, True), (0.93, {}, False), (0.9395, {"steps": 238}, None)],
)
def test_an_accuracy_agrees_at_full_size(value, flags, agrees):
    arm = {
        "arm": "bn", "seeds": 20, "epochs": 9.917, "mean_accuracy": {"mean": value},
        "run_seconds": {"median": 4.0},
    }  # fmt: skip
    found = list(cifar_speedrun.rows(cifar_speedrun.Config(**flags), [arm, {"arm": "none"}]))
    assert [row.get("agrees") for row in found] == [agrees, None, None]
    assert found[0]["here"].startswith(f"{value:.2%}")
    assert found[1]["here"] == "9.9"
    assert found[2]["here"] == "4"


def test_seconds_are_of_training_and_one_evaluation():
    record = {"steps": [0, 34, 68], "seconds": {"training": 2.0, "evaluation": 1.5}}
    assert cifar_speedrun.run_seconds(record) == 2.5


def reported(name, accuracies):
    return {
        "arm": name, "learning_rate": 11.5, "seeds": len(accuracies), "reached": 1,
        "diverged": 0, "accuracies": accuracies,
        "mean_accuracy": cifar_speedrun.mean(accuracies),
        "epochs_to_target": {"median": 9.9, "ci95": [9.2, None]},
        "seconds_to_target": {"median": None, "ci95": [3.0, None]},
    }  # fmt: skip


def test_the_figure_and_the_table():
    arms = [reported("bn", [0.939, 0.941, 0.0]), reported("ghost", [0.9, 0.91]),
            reported("none", [0.5])]  # fmt: skip
    arms[0]["mean_accuracy"] = cifar_speedrun.mean([0.939, 0.941])
    summary = {"arms": arms, "target": {"value": 0.94}}
    (ax,) = speedrun.accuracies(summary).axes
    dots = [line.get_xdata() for line in ax.lines if line.get_linestyle() == "None"]
    assert [90.0, 91.0] in [[round(x, 6) for x in d] for d in dots]
    assert [t.get_text().strip() for t in ax.texts] == ["<- 50.0 %"]
    low, high = ax.get_xlim()
    assert 89 < low < 90
    assert 94.1 < high < 95
    table = speedrun.table(summary)
    assert table["header"][3:5] == ["epochs to 94 %", "seconds to 94 %"]
    assert table["rows"][1][3:5] == ["9.90\n[9.20, never]", "never\n[3.00, never]"]
    assert table["rows"][2][2:4] == ["50.00", "9.90"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Summary, output, folder."""
    folder = tmp_path_factory.mktemp("speedrun") / "w"
    config = cifar_speedrun.Config(
        quick=True, arms=("ghost_32",), features=(8,), steps=126, eval_every=63, views=1,
        learning_rates=(30.0, 60.0), seeds=1, checkpoint_every=0.0, workdir=str(folder),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as written, redirect_stderr(io.StringIO()):
        summary = cifar_speedrun.run(config)
    return summary, written.getvalue(), folder


def test_what_it_leaves(finished):
    summary, written, folder = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    figures = sorted(os.listdir(folder / "figures"))
    assert figures == ["accuracy.png", "captions.json", "learning_curves.png"]
    assert "Accuracy, and how soon it is 90 %" in written
    assert summary["published"] == []


def test_the_recipe_trains_the_network(finished):
    (ghost,) = finished[0]["arms"]
    assert (ghost["momentum"], ghost["epochs"]) == (0.6, 6)
    assert len(finished[0]["by_point"]) == 2
    assert ghost["accuracies"] == [ghost["mean_accuracy"]["mean"]]
    assert ghost["mean_accuracy"]["mean"] > 0.5


def test_without_batch_norm_convolutions_have_biases():
    config = cifar_speedrun.Config(quick=True, features=(8,))
    arm, dataset = cifar_speedrun.arms(config)["none"], airbench.load(config)
    run = airbench.build(config, arm, dataset)
    state = jax.eval_shape(run.init, jax.random.key(0), Swept(), dataset.train.inputs)
    assert {k: sorted(v) for k, v in state.train.params.items()} == {
        "Whitening_0": ["bias"], "Conv_0": ["bias", "kernel"], "Conv_1": ["bias", "kernel"],
        "Dense_0": ["kernel"],
    }  # fmt: skip
    found = airbench.groups(state.train.params)
    assert found["Whitening_0"]["bias"] == "whitening"
    assert {found["Conv_0"]["bias"], found["Conv_0"]["kernel"]} == {"rest"}
