"""ImageNet's experiment on a small set of real JPEG files in its format; no network."""

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_imagenet as tiny
from PIL import Image

from bn_jax.errors import UserError
from bn_jax.lab import models
from bn_jax.lab.flags import Stopped
from bn_jax.lab.models import ResNet18
from bn_jax.lab.report import read_records
from bn_jax.lab.tools import checkpoint
from bn_jax.lab.training.parallel import batch_mesh
from bn_jax.linen import BatchNorm
from experiments import imagenet
from experiments import imagenet_training as training
from experiments.imagenet_training import Training

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
from bn_jax.lab import flags, models
from experiments import imagenet
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
    made, network = {}, training.network
    place = {"data_dir": None, "workdir": None, "checkpoint_every": 0, "max_bad_examples": 0}

    def get(config, *rest):
        key = dataclasses.replace(config, **place)
        made[key] = made.get(key) or network(config, *rest)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "network", get)
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
    """What the last checkpoint has, as the tools for models read it."""
    found = checkpoint._restore(folder / "checkpoints" / arm / str(step) / "state")
    return {name: found[name] for name in found if name != "sums"}


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
    expected = {"bad_examples": 0, "skipped_steps": 0, "diverged_at": None}
    assert record.items() >= expected.items()
    assert "bn: top-5 at the end" in (folder / "report.html").read_text()


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


def test_eight_devices_are_one(whole, data_dir, tmp_path, monkeypatch):
    """Of twelve examples: four of the devices' sixteen only fill up."""
    monkeypatch.setattr(training, "batch_mesh", lambda: batch_mesh(1))
    run(tmp_path / "w", data_dir, seed=0, log_every=3)  # which compiles anew
    (one,), (eight,) = records(whole[0]), records(tmp_path / "w")
    for name in ("train_loss", "train_accuracy", "test_loss", "test_top5_accuracy"):
        assert eight[name][1:] == pytest.approx(one[name][1:], abs=1e-5)
    for name in ("params", "batch_stats"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())),
            final(tmp_path / "w")[name], final(whole[0])[name],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "step"), [("_advance", 3), ("_evaluate", 3), ("_evaluate", STEPS)]
)
def test_sigterm_saves(whole, data_dir, tmp_path, monkeypatch, moment, step):
    """In a step, in an evaluation, in the last one: the rest ends with the same bits."""
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
    run(tmp_path / "w", data_dir)
    assert_same(tmp_path / "w", whole[0])


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
    assert 0 < abs(losses[0] - losses[1]) < 0.05 * losses[1]
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
    monkeypatch.setattr(Training, "_advance", None)
    run(folder, data_dir)
    assert_same(folder, whole[0])


@pytest.mark.parametrize(("learning_rate", "looked"), [(1e38, 0)])
def test_a_run_whose_steps_are_all_skipped_has_diverged(
    data_dir, tmp_path, monkeypatch, learning_rate, looked
):
    run(tmp_path / "w", data_dir, learning_rate=learning_rate)
    (record,) = records(tmp_path / "w")
    assert record["diverged_at"] is not None
    assert record["test_loss"][-1] is None
    assert record["skipped_steps"] <= STEPS


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "mlp"}, "--model=mlp: choose from resnet50, "),
        ({"dtype": "float16"}, "--dtype=float16: choose from"),
        ({"optimizer": "sdg"}, "--optimizer: unknown 'sdg', choose from sgd, "),
        ({"schedule": "linear"}, "--schedule: unknown 'linear', choose from goyal, constant, "),
        ({"target": 0.0}, "--target=0.0: it must be above 0"),
        ({"arms": ("bn", "bn")}, "--arms=bn,bn"),
        ({"arms": ("batch",)}, "--arms: unknown 'batch'"),
        ({"image_size": 0}, "--image_size=0"),
        ({"workers": -1}, "--workers=-1"),
        ({"batch_size": 27}, "--batch_size=27: choose at most the 26 training examples"),
        ({"batch_size": 8, "train_examples": 6}, "at most the 6 training examples"),
        ({"warmup_epochs": 4}, "--warmup_epochs=4 are 8 of 7 steps"),
        ({"test_split": "test"}, "no split 'test'"),
        ({"dataset": "imagenet_v2"}, "not prepared"),
    ],
)
def test_what_is_refused(data_dir, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "w", data_dir, **flags)
