"""The GPU's benchmark at tiny sizes on the CPU; what it prints, and what it survives."""

import contextlib
import dataclasses
import functools
import importlib
import io
import re
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contestants, gpu, gpu_layers, gpu_networks, gpu_timer
from benchmarks.gpu_timer import SKIPPED, Timer
from bn_jax.data import Split
from bn_jax.data.dataset import Dataset
from bn_jax.errors import UserError
from bn_jax.measure.timing import WARMUP
from bn_jax.models import ResNet

TINY = functools.partial(ResNet, 10, width=1 / 16, stem="small", blocks=())
CONFIG = gpu.Config(
    copies=(1e-5, 1e-4), shapes=("8x2x2x3",), dtypes=("bfloat16",), features=(2, 3, 4), batch=4,
    examples=12, networks=("ResNet-50",), network_batch=2, size=16, calls=2, steps=1, rounds=1,
    speedrun=False,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tiny_and_alone():
    """A small network, and no dataset."""

    def no_images(name, **_):
        raise UserError(f"dataset {name!r} is not prepared")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_networks.NETWORKS, "ResNet-50", TINY)
        patch.setattr(gpu_networks, "load", no_images)
        patch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # and back afterwards
        yield


@pytest.fixture(scope="module")
def whole():
    """The program from start to end: its rows, what it printed, what was computed."""
    results, warm = [], gpu_timer.warm

    def recorded(call, calls):
        results.append(call())
        return warm(call, calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_timer, "warm", recorded)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result = gpu.run(CONFIG)
    return result, printed.getvalue(), results


@pytest.mark.long
def test_every_part_is_timed(whole):
    result = whole[0]
    assert [row["bytes"] for row in result["copy"]] == [10736, 107372]
    wanted = [
        (t, n) for t in ("forward+backward", "BN+ReLU fwd+bwd") for n in ("bn_jax", "flax fast")
    ]
    assert [(row["task"], row["layer"]) for row in result["layer"]] == wanted
    assert [row["what"].split(",")[0] for row in result["network_a"]] == [
        "step",
        "epoch",
        "epoch",
    ]
    assert {row["data"] for row in result["network_a"]} == {"random images"}
    assert [row["norm"] for row in result["networks"]] == ["bn_jax", "none", "flax"]
    for part in gpu.PARTS:
        assert all(row["seconds"] > 0 and row["note"] == "" for row in result[part])


@pytest.mark.long
def test_what_is_printed(whole):
    result, text, _ = whole
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    tables = [i for i, row in enumerate(cells) if row[0] == ":--"]
    assert len(tables) == len(gpu.PARTS)
    sizes = [len(result[part]) for part in gpu.PARTS]
    assert len(cells) == sum(sizes) + 2 * len(tables)
    first = result["copy"][0]
    assert float(cells[2][1]) == pytest.approx(1e3 * first["seconds"], rel=0.01)
    # The share of BatchNorm: of the steps with one, and not of that without.
    assert [row[-1] != "" for row in cells[-3:]] == [True, False, True]
    assert "speedrun" not in text


def test_share_of_the_bandwidth():
    """8 passes over 96 numbers of two bytes in a second, of a bandwidth of 3072 bytes/s."""

    def timed(makers, calls):
        return {name: {"seconds": 1.0, "note": ""} for name in makers}

    rows = gpu_layers.layers("8x2x2x3", "bfloat16", 3072.0, timed, 1)
    assert [row["share"] for row in rows] == [0.5] * 4
    rows = gpu_layers.layers("8x2x2x3", "bfloat16", 0, timed, 1)
    assert [row["share"] for row in rows] == [None] * 4


def test_share_of_the_norms():
    seconds = {"bn_jax": 0.5, "none": 0.4, "flax": None}

    def timed(makers, calls):
        return {name: {"seconds": seconds[name], "note": ""} for name in makers}

    rows = gpu_networks.with_and_without_norm("ResNet-50", 8, 16, timed, 1)
    assert [row["share"] for row in rows] == [pytest.approx(0.2), None, None]
    assert [row["images_per_second"] for row in rows] == [16, 20, None]


@pytest.mark.long
def test_networks_differ_in_the_norm_alone(whole):
    """From one start, our layer and Flax's come to one loss, weights and statistics."""
    (ours, loss), (without, _), (flax, other) = whole[2][-3:]
    assert float(loss) == pytest.approx(float(other), abs=1e-3)
    jax.tree.map(close, ours.batch_stats, flax.batch_stats)
    jax.tree.map(close, ours.params, flax.params)
    assert jax.tree.leaves(ours.batch_stats)
    assert not jax.tree.leaves(without.batch_stats)


def close(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=0.02, atol=1e-3)  # bfloat16


@pytest.mark.long
def test_epochs_are_the_same_training(whole):
    """As one program and as a call for each step: the same batches and noise."""
    step, *epochs = whole[2][-6:-3]
    assert int(step.train.step) == 1
    assert [int(epoch.train.step) for epoch in epochs] == [3, 3]
    one, other = (float(epoch.sums.loss) for epoch in epochs)
    assert one == pytest.approx(other, rel=1e-5)
    first, epoch, _ = whole[0]["network_a"]
    assert first["images_per_second"] * first["seconds"] == pytest.approx(4)
    assert epoch["images_per_second"] * epoch["seconds"] == pytest.approx(12)


def test_cifar10_where_it_is(monkeypatch):
    split = Split(jnp.zeros((5, 32, 32, 3), jnp.uint8), jnp.zeros(5, jnp.int32))
    given = {}

    def load(name, **options):
        given.update(options, name=name)
        return Dataset(split, split, split, 10, 0, 1)

    monkeypatch.setattr(gpu_networks, "load", load)
    assert gpu_networks.cifar10(5, "here", "there") == (split, "CIFAR-10")
    assert (given["name"], given["train_examples"]) == ("cifar10", 5)
    assert (given["data_dir"], given["cache_dir"]) == ("here", "there")


def test_nothing_starts_after_the_budget(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SPEEDRUN", ("-c", "print('it ran')"))
    result = gpu.run(dataclasses.replace(CONFIG, minutes=0, speedrun=True))
    notes = [row["note"] for part in gpu.PARTS for row in result[part]]
    assert set(notes) == {SKIPPED}
    assert len(notes) == 2 + 4 + 3 + 3
    assert result["speedrun"] == SKIPPED
    lines = [line for line in capsys.readouterr().out.splitlines() if "| skipped |" in line]
    assert len(lines) == len(notes)


def test_a_part_that_fails_is_not_the_last(monkeypatch, capsys):
    def broken(*_):
        yield [{"n": "1"}]
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes")

    monkeypatch.setattr(
        gpu, "PARTS", {"copy": gpu.Part("{batch} images:", {"n": lambda r: r["n"]}, broken)}
    )
    assert gpu.run(CONFIG)["copy"] == [{"n": "1"}]
    printed = capsys.readouterr().out
    assert re.search(r"4 images:\n\n\| n \|\n\| :-- \|\n\| 1 \|\n\nout of memory\n", printed)


@pytest.mark.parametrize(("code", "how"), [("0", "done"), ("3", "ended with status 3")])
def test_speedrun(monkeypatch, capfd, code, how):
    program = f"import sys; print(sys.argv[1:]); raise SystemExit({code})"
    monkeypatch.setattr(gpu, "PARTS", {})
    monkeypatch.setattr(gpu, "SPEEDRUN", ("-c", program))
    assert gpu.run(gpu.Config(cache_dir="a b"))["speedrun"] == how
    lines = capfd.readouterr().out.splitlines()[2:]
    fence, command, _, ran, end, _, last = lines
    assert (fence, end, last) == ("```", "```", f"The speedrun: {how}.")
    assert command.endswith("'--cache_dir=a b'")
    assert ran == "['--cache_dir=a b']"


def test_speedrun_knows_its_flags():
    _, module, *given = gpu.SPEEDRUN
    known = importlib.import_module(module).Config
    names = {flag.removeprefix("--").split("=")[0] for flag in given}
    assert names | {"data_dir", "cache_dir"} <= {f.name for f in dataclasses.fields(known)}


def test_torch_where_it_has_cuda(monkeypatch):
    """It is asked for CUDA, and waited for once in each measurement."""
    devices, waited = [], []

    def torch_layer(task, x, dy, device):
        devices.append(device)
        return lambda: x.shape

    cuda = SimpleNamespace(is_available=lambda: True, synchronize=lambda: waited.append(1))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(contestants, "import_torch", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(contestants, "torch_layer", torch_layer)
    arrays = functools.partial(gpu_layers.random_arrays, "2x3", "float32")
    make = gpu_layers.makers(contestants.BOTH, arrays)["torch"]
    found = Timer(time.monotonic() + 60, rounds=3)({"torch": make}, 5)
    assert found["torch"]["note"] == ""
    assert devices == ["cuda"]
    assert len(waited) == 1 + WARMUP + 3


def test_no_torch_beside_jax_on_the_cpu():
    assert not contestants.has_cuda_torch()


@pytest.mark.parametrize(
    "wrong",
    [
        {"shapes": ("4x0",)},
        {"dtypes": ("int8",)},
        {"rounds": 0},
        {"networks": ("ResNet-5",)},
        {"examples": 255},
        {"calls": 0},
        {"steps": 0},
    ],
)
def test_flags_are_checked(wrong):
    with pytest.raises(UserError):
        gpu.Config(**wrong)
