"""The GPU's benchmark at tiny sizes on the CPU; what it prints, and what it survives."""

import contextlib
import dataclasses
import functools
import io
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contestants, gpu, gpu_layers, gpu_networks, gpu_timer
from benchmarks.gpu_networks import NORMS, OURS, WITHOUT
from benchmarks.gpu_timer import SKIPPED, Timer
from bn_jax.data import Split
from bn_jax.data.dataset import Dataset
from bn_jax.errors import UserError
from bn_jax.measure.timing import WARMUP
from bn_jax.models import ResNet

REAL = dict(gpu_networks.NETWORKS)
# With BatchNorm and without.
PARAMETERS = {
    "ResNet-50": (25_557_032, 25_530_472), "BN-Inception": (11_188_288, 11_178_336)
}  # fmt: skip
TINY = functools.partial(ResNet, 10, width=1 / 16, stem="small", blocks=())
CONFIG = gpu.Config(
    copies=(1e-5, 1e-4), shapes=("8x2x2x3",), dtypes=("bfloat16",), features=(2, 3, 4), batch=4,
    examples=12, networks=("ResNet-50",), network_batch=2, size=16, calls=2, steps=1, rounds=1,
    speedrun=0.0,
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
    layers = ("bn_jax", "flax fast", "torch")
    wanted = [(t, n) for t in ("forward+backward", "BN+ReLU fwd+bwd") for n in layers]
    assert [(row["task"], row["layer"]) for row in result["layer"]] == wanted
    assert [row["what"].split(",")[0] for row in result["network_a"]] == [
        "step",
        "epoch",
        "epoch",
    ]
    assert {row["data"] for row in result["network_a"]} == {"random images"}
    assert [row["norm"] for row in result["networks"]] == ["bn_jax", "none", "flax"]
    for part in gpu.PARTS:
        ours = [row for row in result[part] if row.get("layer") != "torch"]
        assert all(row["seconds"] > 0 and row["note"] == "" for row in ours)
    assert result["speedrun"] == []


@pytest.mark.long
def test_what_is_printed(whole):
    """The machine, that it has no GPU, and one table."""
    result, text, _ = whole
    machine, none, empty, *table = text.splitlines()
    assert (machine, empty) == (result["machine"], "")
    assert none == "No GPU: what follows is this processor's."
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table]
    assert cells[0] == gpu.COLUMNS
    assert [row[0] == ":--" for row in cells] == [i == 1 for i in range(len(cells))]
    assert len(cells) == 2 + sum(len(result[part]) for part in gpu.PARTS)
    assert float(cells[2][1]) == pytest.approx(1e3 * result["copy"][0]["seconds"], rel=0.01)
    # The share of BatchNorm: of the steps with one, and not of that without.
    assert [row[3] != "" for row in cells[-3:]] == [True, False, True]
    assert "network A, random images: step" in {row[0] for row in cells}
    assert "no torch with CUDA" in {row[0][-5:]: row[4] for row in cells}["torch"]


def test_share_of_the_bandwidth():
    """8 passes over 96 numbers of two bytes in a second, of a bandwidth of 3072 bytes/s."""

    def timed(makers, calls):
        return {name: {"seconds": 1.0, "note": ""} for name in makers}

    rows = gpu_layers.layers("8x2x2x3", "bfloat16", 3072.0, timed, 1)
    assert [row["share"] for row in rows] == [0.5] * 6
    rows = gpu_layers.layers("8x2x2x3", "bfloat16", 0, timed, 1)
    assert [row["share"] for row in rows] == [None] * 6


def test_share_of_the_norms():
    seconds = {"bn_jax": 0.5, "none": 0.4, "flax": None}

    def timed(makers, calls):
        return {name: {"seconds": seconds[name], "note": ""} for name in makers}

    rows = gpu_networks.with_and_without_norm("ResNet-50", 8, 16, timed, 1)
    assert [row["share"] for row in rows] == [pytest.approx(0.2), None, None]
    assert [row["images_per_second"] for row in rows] == [16, 20, None]


@pytest.mark.parametrize("name", REAL)
def test_the_networks_that_are_timed(monkeypatch, name):
    """Traced at their sizes: one state does for both norms, and a step leads to its like."""
    monkeypatch.setitem(gpu_networks.NETWORKS, name, REAL[name])
    data = functools.partial(gpu_networks.random_batch, 2, 224)
    images, labels = jax.eval_shape(data)
    example = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    states = {}
    for n, norm in NORMS.items():
        first = functools.partial(gpu_networks.first_state, name, norm)
        states[n] = state = jax.eval_shape(first, jax.random.key(0), example)
        after, means = jax.eval_shape(gpu_networks.step_of(name, norm), state, images, labels)
        assert after == state
        assert means.loss.shape == ()
    assert states[OURS] == states["flax"]
    counts = [sum(v.size for v in jax.tree.leaves(states[n].params)) for n in (OURS, WITHOUT)]
    assert tuple(counts) == PARAMETERS[name]


@pytest.mark.long
def test_networks_differ_in_the_norm_alone(whole):
    """From one start, our layer and Flax's come to one loss, weights and statistics."""
    (ours, means), (without, _), (flax, others) = whole[2][-3:]
    assert float(means.loss) == pytest.approx(float(others.loss), abs=1e-3)
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


def test_nothing_starts_after_the_budget(capsys):
    result = gpu.run(dataclasses.replace(CONFIG, minutes=0, speedrun=0.5))
    notes = [row["note"] for part in gpu.PARTS for row in result[part]]
    assert set(notes) == {SKIPPED}
    assert len(notes) == 2 + 6 + 3 + 3 + 1
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert sum(line.rstrip(" |").endswith("| skipped") for line in text.splitlines()) == 15


def test_a_part_that_fails_is_not_the_last(monkeypatch, capsys):
    def broken(*_):
        yield {"n": "1", "seconds": 2.0, "note": ""}
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes")

    def good(config, timed, result):
        yield {"n": str(len(result["copy"])), "seconds": None, "note": "why"}

    parts = {
        "copy": gpu.Part(broken, lambda r: r["n"]),
        "next": gpu.Part(good, lambda r: r["n"]),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.run(CONFIG)["copy"][1:] == [{"name": "copy", "note": "out of memory"}]
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "| 1 | 2,000 |  |  |  |",
        "| copy |  |  |  | out of memory |",
        "| 2 |  |  |  | why |",
    ]


def test_the_speedrun_has_its_share_and_what_is_left(monkeypatch):
    """Its end is that of the minutes; what is timed before ends sooner."""
    given = []

    def speedrun(*arguments):
        given.append(arguments)
        yield {"arm": "bn", "seconds": 3.0, "epochs": 9.9, "accuracy": 0.94, "note": ""}

    monkeypatch.setattr(gpu, "speedrun", speedrun)
    part = gpu.PARTS["speedrun"]
    config = gpu.Config(minutes=8, speedrun=0.25, cache_dir="a b")
    (row,) = part.measure(config, Timer(100.0, rounds=1), {})
    ((flags, folder, end),) = given
    assert (flags, end) == (["--cache_dir=a b"], 100 + 120)
    assert folder.parts[:2] == ("runs", "gpu")
    assert part.line(row) == ["speedrun: bn", "3,000", "9.9 epochs", "94.00 % right", ""]


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


def test_a_torch_that_cannot_be_used_costs_its_row(monkeypatch):
    """Beside JAX on a GPU it may have no CUDA, or fail to be imported."""

    def broken():
        raise OSError("libcudart.so: cannot open shared object file")

    assert not contestants.has_cuda_torch()  # as JAX is on the CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: name)
    cuda = SimpleNamespace(is_available=lambda: False)
    for torch, note in (
        (lambda: SimpleNamespace(cuda=cuda), "no torch with CUDA beside JAX on a GPU"),
        (broken, "OSError: libcudart.so: cannot open shared object file"),
    ):
        monkeypatch.setattr(contestants, "import_torch", torch)
        arrays = functools.partial(gpu_layers.random_arrays, "2x3", "float32")
        found = Timer(time.monotonic() + 60, rounds=1)(
            gpu_layers.makers(contestants.BOTH, arrays), 1
        )
        assert found["torch"] == {"seconds": None, "note": note}
        assert found["bn_jax"]["seconds"] > 0


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
        {"speedrun": -0.1},
        {"speedrun": 1.5},
    ],
)
def test_flags_are_checked(wrong):
    with pytest.raises(UserError):
        gpu.Config(**wrong)
