"""ImageNet's experiment on a small set of real JPEG files in its format; no network."""

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_imagenet as tiny
from PIL import Image

from bn_jax import models
from bn_jax.errors import UserError
from bn_jax.linen import BatchNorm
from bn_jax.measure.layouts import Single
from bn_jax.models import ResNet18
from bn_jax.report import read_records
from bn_jax.training.checkpoint import Checkpoints
from bn_jax.training.metrics import correct, in_top
from experiments import checkpoint, imagenet, imagenet_arms, streaming
from experiments.epochs import Training, workers
from experiments.flags import Stopped
from experiments.position import Position, evaluations

SIZE, COUNT, TESTS, STEPS = 32, 26, 10, 7
TINY = {
    "model": "resnet18", "width": 1 / 16, "image_size": SIZE, "dtype": "float32",
    "batch_size": 12, "steps": STEPS, "eval_every": 3, "warmup_epochs": 0, "workers": 0,
    "log_every": 2, "learning_rate": 2.0,
}  # fmt: skip
# One block of the eight: most of the time goes into compilation.
NETWORK = functools.partial(ResNet18, blocks=(1,))
PROGRAM = """
import functools
from bn_jax import models
from experiments import flags, imagenet
models.FAMILIES["resnet18"] = functools.partial(models.ResNet18, blocks=(1,))
flags.main(imagenet.Config, imagenet.run)
"""
TRAIN = tiny.examples(COUNT)
TEST = tiny.examples(TESTS, seed=1)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write(folder, {"train": TRAIN, "validation": TEST})
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """A network's programs serve all runs of the same flags."""
    made, compiled = {}, imagenet_arms.compiled
    place = {"data_dir": None, "workdir": None, "checkpoint_every": 0, "max_bad_examples": 0}

    def get(config, network):
        key = dataclasses.replace(config, **place)
        made[key] = made.get(key) or compiled(config, network)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet_arms, "compiled", get)
        patch.setitem(models.FAMILIES, "resnet18", NETWORK)
        yield


def run(folder, data_dir, **flags):
    config = imagenet.Config(**(TINY | flags), workdir=str(folder), data_dir=data_dir)
    return imagenet.run(config)


def records(folder):
    """Without what differs from run to run."""
    found = read_records(folder / "records.jsonl")
    return [{k: v for k, v in r.items() if k != "seconds"} for r in found]


def final(folder, step=STEPS, arm="bn"):
    """All that the last checkpoint has, as the tools for models read it."""
    return checkpoint._restore(folder / "checkpoints" / arm / str(step) / "state")


def assert_same(folder, expected):
    assert records(folder) == records(expected)
    ours, theirs = (jax.tree.leaves_with_path(final(f)) for f in (folder, expected))
    assert len(ours) == len(theirs) > 20
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """A run that nobody disturbs: its folder, and the summary."""
    folder = tmp_path_factory.mktemp("whole") / "w"
    return folder, run(folder, data_dir)


def test_what_it_leaves(whole):
    folder, summary = whole
    assert json.loads((folder / "summary.json").read_text()) == summary
    (record,) = records(folder)
    assert record["steps"] == [0, 3, 6, 7]
    assert record["learning_rate"] == 2.0 * 12 / 256
    assert record["train_loss"][0] is None
    for name in ("train_loss", "train_accuracy", "test_loss", "test_top5_accuracy"):
        assert len(record[name]) == 4
        assert None not in record[name][1:]
    assert record["test_loss"][-1] < record["test_loss"][0] == record["validation_loss"][0]
    assert (record["bad_examples"], record["skipped_steps"], record["diverged_at"]) == (
        0,
        0,
        None,
    )
    found = dict(zip(record["steps"][1:], record["test_accuracy"][1:], strict=True))
    kept = {int(p) for p in os.listdir(folder / "checkpoints" / "bn")}
    assert STEPS in kept
    assert max(found.values()) in {found[step] for step in kept}  # the best one stays
    page = (folder / "report.html").read_text()
    assert "split validation, on which nothing is chosen" in page
    assert "bn: top-5 at the end" in page
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["steps"] == STEPS
    assert (folder / "figures" / "learning_curves.png").stat().st_size > 10_000


def alone(image, size=SIZE):
    """The centre of an image, standardised: `[1, size, size, 3]`."""
    opened = Image.open(io.BytesIO(image))
    side = 0.875 * min(opened.size)
    x, y = ((v - side) / 2 for v in opened.size)
    box = (x, y, x + side, y + side)
    pixels = np.asarray(opened.resize((size, size), Image.Resampling.BILINEAR, box))
    return ((pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])[None]


def test_evaluation_counts_every_example_once(whole):
    """The last batch has two examples, and ten that fill it up."""
    state = final(whole[0])
    model = NETWORK(1000, norm=BatchNorm, width=TINY["width"])
    apply = jax.jit(lambda x: model.apply(variables, x, train=False))
    variables = {name: state[name] for name in ("params", "batch_stats")}
    outputs = np.concatenate([apply(np.float32(alone(e.image))) for e in TEST])
    labels = np.array([e.label for e in TEST])
    loss = -np.asarray(jax.nn.log_softmax(outputs))[np.arange(TESTS), labels]
    ranks = (-outputs).argsort(1).argsort(1)[np.arange(TESTS), labels]
    (record,) = records(whole[0])
    assert record["test_loss"][-1] == pytest.approx(loss.mean(), rel=1e-4)
    assert record["test_accuracy"][-1] == (ranks < 1).mean().round(6)
    assert record["test_top5_accuracy"][-1] == (ranks < 5).mean().round(6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_in_top(k):
    rng = np.random.default_rng(0)
    outputs, labels = rng.integers(0, 3, (200, 4)).astype(np.float32), rng.integers(0, 4, 200)
    order = np.argsort(-outputs, 1, kind="stable")[:, :k]
    expected = [label in row for label, row in zip(labels, order, strict=True)]
    np.testing.assert_array_equal(in_top(jnp.array(outputs), jnp.array(labels), k), expected)
    if k == 1:
        np.testing.assert_array_equal(correct(jnp.array(outputs), labels), expected)


def test_eight_devices_are_one(whole, data_dir, tmp_path):
    """Of twelve examples: four of the devices' sixteen only fill up."""
    run(tmp_path / "w", data_dir, parallel="pmap")
    (one,), (eight,) = records(whole[0]), records(tmp_path / "w")
    for name in ("train_loss", "train_accuracy", "test_loss", "test_top5_accuracy"):
        assert eight[name][1:] == pytest.approx(one[name][1:], abs=1e-5)
    for name in ("params", "batch_stats"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())),
            final(tmp_path / "w")[name], final(whole[0])[name],
        )  # fmt: skip


# Survival


class Kill(BaseException):
    pass


@pytest.mark.parametrize("last", [1, 3, 6])
def test_killed_between_checkpoints(whole, data_dir, tmp_path, monkeypatch, last):
    """Two steps after the last checkpoint; 3 and 6 are evaluated after it."""
    with monkeypatch.context() as patch:
        advance = Training._advance

        def until(self, *batch):
            if self.position.step == min(last + 2, STEPS - 1):
                raise Kill
            advance(self, *batch)

        def due(self, seconds):
            return seen[-1].position.step == last

        seen, look = [], Training._look
        patch.setattr(Training, "_look", lambda self, i: (seen.append(self), look(self, i)))
        patch.setattr(Training, "_advance", until)
        patch.setattr(Checkpoints, "due", due)
        with pytest.raises(Kill):
            run(tmp_path / "w", data_dir)
    saved = [int(p) for p in os.listdir(tmp_path / "w" / "checkpoints" / "bn")]
    assert last in saved
    assert max(saved) < STEPS
    run(tmp_path / "w", data_dir)
    assert_same(tmp_path / "w", whole[0])


def ranked(folder):
    """The steps whose checkpoints have what the best is chosen by."""
    return {path.parent.name for path in (folder / "checkpoints" / "bn").glob("*/metrics")}


@pytest.mark.parametrize(
    ("moment", "step"), [("_advance", 3), ("_evaluate", 3), ("_evaluate", STEPS)]
)
def test_sigterm_saves(whole, data_dir, tmp_path, monkeypatch, moment, step):
    """In a step, in an evaluation, in the last one."""
    with monkeypatch.context() as patch:
        method = getattr(Training, moment)

        def signalled(self, *args):
            if self.position.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            method(self, *args)

        patch.setattr(Training, moment, signalled)
        with pytest.raises(Stopped):
            run(tmp_path / "w", data_dir)
    assert not (tmp_path / "w" / "summary.json").exists()
    assert run(tmp_path / "w", data_dir)["arms"][0]["diverged"] == 0
    assert_same(tmp_path / "w", whole[0])
    assert ranked(tmp_path / "w") == ranked(whole[0])
    checkpoints = Checkpoints(tmp_path / "w" / "checkpoints" / "bn")
    assert checkpoints.newest().extra["ended"]
    checkpoints.close()


@pytest.mark.long
def test_killed_by_the_system_in_half_precision(whole, data_dir, server, tmp_path):
    """With a checkpoint at every step; in a process of its own."""
    given = TINY | {"data_dir": data_dir, "checkpoint_every": 0, "dtype": "bfloat16"}
    flags = [f"--{name}={value}" for name, value in given.items()]
    assert server.run(*flags, f"--workdir={tmp_path / 'a'}", code=PROGRAM).code == 0
    pid = server.start(*flags, f"--workdir={tmp_path / 'b'}", code=PROGRAM)
    while not any((tmp_path / "b" / "checkpoints" / "bn").glob("[3-9]")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert server.wait().code == -signal.SIGKILL
    done = server.run(*flags, f"--workdir={tmp_path / 'b'}", code=PROGRAM)
    assert done.code == 0
    assert_same(tmp_path / "b", tmp_path / "a")
    assert "bn: images per second in training" in done.out
    losses = [records(f)[0]["train_loss"][1] for f in (tmp_path / "b", whole[0])]
    assert 1e-5 < abs(losses[0] - losses[1]) < 0.05 * losses[1]
    dtypes = {v.dtype for v in jax.tree.leaves(final(tmp_path / "b")["params"])}
    assert dtypes == {jnp.dtype("float32")}
    other = [f for f in flags if "learning_rate" not in f] + [f"--workdir={tmp_path / 'b'}"]
    assert (
        "whose --learning_rate is 2.0 and not 0.1" in server.run(*other, code=PROGRAM).error()
    )


def test_an_arm_that_is_done_is_not_trained_again(whole, data_dir, tmp_path, monkeypatch):
    """As after a kill in the arm that follows."""
    folder = tmp_path / "w"
    shutil.copytree(whole[0], folder)
    (folder / "summary.json").unlink()
    (folder / "records.jsonl").unlink()
    monkeypatch.setattr(imagenet_arms, "compiled", None)
    run(folder, data_dir)
    assert_same(folder, whole[0])
    # And a run that is done altogether is left as it is.
    (folder / "records.jsonl").unlink()
    assert run(folder, data_dir) == json.loads((folder / "summary.json").read_text())
    assert not (folder / "records.jsonl").exists()


def test_help(server):
    done = server.run("--help", code=PROGRAM)
    assert "--max_bad_examples" in done.out


# Bad input


def test_broken_images_are_counted_once(tmp_path):
    """In two epochs and at every evaluation; or refused."""
    broken = [e._replace(image=e.image[:300]) if i == 5 else e for i, e in enumerate(TRAIN)]
    tests = [TEST[0]._replace(image=b""), *TEST[1:]]
    tiny.write(tmp_path / "data", {"train": broken, "validation": tests})
    flags = {"data_dir": str(tmp_path / "data"), "max_bad_examples": 1}
    run(tmp_path / "w", **flags)
    (record,) = records(tmp_path / "w")
    assert (record["bad_examples"], record["skipped_steps"]) == (2, 0)
    accuracies = 9 * np.array(record["test_top5_accuracy"])
    np.testing.assert_allclose(accuracies, accuracies.round(), atol=1e-5)
    with pytest.raises(UserError, match=r"1 broken images, .* imagenet2012 validation, exa"):
        run(tmp_path / "v", flags["data_dir"])


def test_more_broken_images_than_one_process_has_seen(data_dir, monkeypatch):
    """As where a run went on, or another process met them."""
    training = object.__new__(Training)
    training._config, training.position = imagenet.Config(max_bad_examples=3), Position(bad=2)
    training._bad = 1
    training._add_bad()
    training._bad = 1
    with pytest.raises(UserError, match=r"4 broken images .* max_bad_examples \(now 3\)"):
        training._add_bad()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"parallel": "grid"}, "--parallel=grid: there is one network at a time"),
        ({"parallel": "cores"}, "--parallel=cores: there is one network at a time"),
        ({"model": "mlp"}, "--model: unknown 'mlp', choose from resnet50, "),
        ({"dtype": "float16"}, "--dtype: unknown 'float16'"),
        ({"optimizer": "sdg"}, "--optimizer: unknown 'sdg', choose from sgd, "),
        ({"schedule": "linear"}, "--schedule: unknown 'linear', choose from goyal, constant, "),
        ({"target": 0.0}, r"--target=0.0: an accuracy is in \(0, 1\]"),
        ({"arms": ("bn", "bn")}, "--arms=bn,bn"),
        ({"arms": ("batch",)}, "--arms: unknown 'batch'"),
        ({"image_size": 0}, "--image_size=0"),
        ({"workers": -1}, "--workers=-1"),
        ({"batch_size": 27}, "--batch_size=27 is more than the 26 training examples"),
        ({"batch_size": 8, "train_examples": 6}, "more than the 6 training examples"),
        ({"warmup_epochs": 4}, "--warmup_epochs=4 are 8 of 7 steps"),
        ({"test_split": "test"}, "no split 'test'"),
        ({"dataset": "imagenet_v2"}, "not prepared"),
    ],
)
def test_what_is_refused(data_dir, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "w", data_dir, **flags)


# The parts


class Line(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask=None):
        return nn.Dense(4)(x.mean((1, 2)))


def test_a_run_whose_steps_are_all_skipped_has_diverged():
    network = streaming.Network(lambda axis: Line(), optax.sgd(3e38))
    programs = streaming.Programs(network, Single(), 2, 4)
    batch = streaming.Batch(
        np.full((2, 4, 4, 3), 255, np.uint8), np.arange(2), np.ones(2, bool), np.zeros(2, bool)
    )
    state = programs.init(0)
    seen = []
    for _ in range(streaming.IN_A_ROW + 4):
        state, loss = programs.step(state, programs.put(batch))
        seen.append([int(v) for v in (state.train.skipped, state.skipped, state.diverged_at)])
    good = sum(skipped == 0 for skipped, *_ in seen)
    assert 0 < good < 4
    last = streaming.IN_A_ROW
    expected = [[0, 0, -1]] * good + [[i, i, -1] for i in range(1, last)]
    expected += [[last, last, good]] * (len(seen) - len(expected))
    assert seen == expected
    assert not np.isfinite(loss)
    assert state.sums.steps == good
    assert np.isfinite(state.sums.loss)


def test_the_record_of_a_run_that_has_diverged():
    config = imagenet.Config(steps=10, eval_every=4)
    metrics = (
        "test_loss",
        "test_accuracy",
        "test_top5_accuracy",
        "train_loss",
        "train_accuracy",
    )
    history = [{"step": s} | dict.fromkeys(metrics, s / 10) for s in (0, 4, 8)]
    position = Position(10, history, bad=1, test_bad=2, skipped=6, diverged_at=5)
    record = imagenet_arms.record(config, "bn", position, 1.0)
    assert record["steps"] == [0, 4, 8, 10]
    assert record["test_top5_accuracy"] == record["validation_loss"] == [0, 0.4, None, None]
    assert (record["diverged_at"], record["bad_examples"], record["skipped_steps"]) == (5, 3, 6)


def test_schedules():
    def factors(name, warmup, steps=90):
        config = imagenet.Config(schedule=name, steps=steps)
        f = imagenet_arms._factors(config, warmup)
        return np.array([f(t) for t in range(steps)])

    rise = np.arange(5) / 5
    expected = np.concatenate(
        [rise, np.ones(25), *(0.1**i * np.ones(n) for i, n in ((1, 30), (2, 20), (3, 10)))]
    )
    np.testing.assert_allclose(factors("goyal", 5), expected, rtol=1e-5)
    t = np.arange(85)
    expected = np.concatenate([rise, (1 + np.cos(np.pi * t / 85)) / 2])
    np.testing.assert_allclose(factors("cosine", 5), expected, rtol=1e-4, atol=1e-6)


def test_a_core_is_left_where_the_system_does_not_say_which(monkeypatch):
    """Linux alone has `sched_getaffinity`."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert workers(imagenet.Config()) == os.cpu_count() - 1
    assert workers(imagenet.Config(workers=3)) == 3


def test_an_epoch_is_the_default_between_evaluations(data_dir):
    config = imagenet.Config(batch_size=8, data_dir=data_dir, epochs=4, warmup_epochs=1)
    config, networks = imagenet_arms.build(config, imagenet_arms.open_sets(config))
    assert (config.steps, config.eval_every, list(networks)) == (12, 3, ["bn"])
    assert evaluations(config) == [0, 3, 6, 9, 12]
    assert networks["bn"].model(None).dtype == jnp.bfloat16
