"""The layer's benchmark: it times what it says, and all contestants do the same."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contestants, layer
from benchmarks.contestants import BOTH, FORWARD, TASKS
from bn_jax.errors import UserError
from bn_jax.measure import timing

JAX_LAYERS = ("bn_jax", "flax fast", "flax stable")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layer") / "new"
    config = layer.Config(
        shapes=("4x3x2x5",),
        dtypes=("bfloat16",),
        rounds=2,
        page_faults=True,
        workdir=str(folder),
    )
    result = layer.run(config)
    assert json.loads((folder / "layer.json").read_text()) == json.loads(json.dumps(result))
    return result


def test_a_row_for_every_task_and_contestant(result):
    pytest.importorskip("torch")
    rows = result["rows"]
    expected = [
        (task.name, name)
        for task in TASKS
        for name in ("copy", *JAX_LAYERS, *(() if task.masked else ("torch",)))
    ]
    assert [(row["task"], row["contestant"]) for row in rows] == expected
    assert all(row["seconds"] > 0 for row in rows)
    for row in rows:
        if row["contestant"] == layer.BASELINE:
            assert row["to_flax"] == 1


def test_programs_allocate_their_output_at_least(result):
    arrays = {task.name: 2 if task.backward else 1 for task in TASKS}
    for row in result["rows"]:
        if row["contestant"] in JAX_LAYERS:
            assert row["allocated"] >= arrays[row["task"]] * row["array_bytes"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (16, 5)])
def test_all_compute_the_same(task, shape):
    pytest.importorskip("torch")
    keys = jax.random.split(jax.random.key(0))
    x, dy = (1 + jax.random.normal(key, shape) for key in keys)
    entered = contestants.prepare(task, x, dy)
    ours = entered["bn_jax"].call()
    for name in ("flax fast", "flax stable"):
        jax.tree.map(close, entered[name].call(), ours)
    if task.masked:
        return
    peer = entered["torch"].call()
    y, (dscale, dbias, dx) = peer if task.backward else (peer, (None,) * 3)
    close(y.detach().movedim(1, -1), ours[0])
    if task.backward:
        parameters, ours_dx = ours[1]
        close(dx.movedim(1, -1), ours_dx)
        close(dscale, parameters["scale"])
        close(dbias, parameters["bias"])


def close(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5)


def test_torch_has_the_features_last_in_memory():
    pytest.importorskip("torch")
    x = jnp.zeros((2, 3, 4, 5))
    y = contestants.torch_layer(FORWARD, x, x)()
    assert (y.shape, y.stride()) == ((2, 5, 3, 4), (60, 1, 20, 5))


@pytest.mark.parametrize(
    ("f", "arrays"),
    [
        (lambda x: x, 0),
        (lambda x: x * x, 0),  # x itself, which is an argument
        (jnp.sin, 1),  # its cosine
        (lambda x: jnp.sin(jnp.sin(x)), 2),
        (jax.nn.relu, 0.25),  # where x > 0, a byte for four, and 0 elsewhere, a constant
    ],
)
def test_kept_bytes(f, arrays):
    x = jnp.zeros((8, 4), jnp.float32)
    kept = contestants.kept_bytes(lambda params, stats, x: (f(x), stats), {}, {}, x)
    assert kept == arrays * x.nbytes


@pytest.mark.parametrize("relu", [False, True])
def test_bn_jax_keeps_nothing_of_the_size_of_x(relu):
    x = jnp.zeros((64, 8, 8, 4), jnp.bfloat16)
    apply = contestants.layers(BOTH._replace(relu=relu), x.dtype)["bn_jax"]
    kept = contestants.kept_bytes(apply, *contestants.initial(4), x)
    assert kept < x.nbytes / 100


def test_rounds_interleave_in_changing_order():
    calls = []
    names = ("a", "b", "c")
    seconds = timing.interleave({n: lambda n=n: calls.append(n) for n in names}, rounds=40)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 40 + timing.WARMUP
    assert all(sorted(r) == list(names) for r in rounds)
    assert len(set(rounds)) == 6  # each order of three
    assert {n: len(s) for n, s in seconds.items()} == dict.fromkeys(names, 40)


def test_ratios_are_of_one_round():
    # The second and third rounds are slow, alike for both.
    seconds = {"a": [2.0, 80.0, 40.0], "b": [1.0, 20.0, 20.0]}
    assert timing.median_ratio(seconds, "a", "b") == 2
    assert timing.median_ratio(seconds, "b", "a") == 0.5


def test_floor_is_in_passes_at_the_speed_of_the_copy(monkeypatch):
    # A copy of 1 s makes 2 passes: 3 take 1.5 s, and 8 take 4 s.
    entered = {name: contestants.Contestant(None) for name in ("copy", "bn_jax", "flax fast")}
    seconds = {"copy": [1.0] * 3, "bn_jax": [6.0] * 3, "flax fast": [12.0] * 3}
    monkeypatch.setattr(contestants, "prepare", lambda *_: entered)
    monkeypatch.setattr(layer, "interleave", lambda *_: seconds)
    rows = [r for r in layer.measure("4x2", "float32", 3) if r["contestant"] == "bn_jax"]
    assert [row["to_floor"] for row in rows] == [4, 1.5, 1.5, 1.5]
    assert [row["to_flax"] for row in rows] == [0.5] * 4


def test_verdict():
    share = {"4x4": (0.9, 0.7, 0.4), "64x2": (1.2, 0.8, 0.3)}  # the second is larger
    rows = []
    for s, fractions in share.items():
        for t, f in zip(TASKS, fractions, strict=False):
            row = {"shape": s, "dtype": "float32", "task": t.name, "to_floor": 2.0}
            rows += [
                row | {"contestant": "bn_jax", "to_flax": f, "allocated": 10 + 10 * f},
                row | {"contestant": "flax fast", "to_flax": 1.0, "allocated": 20},
                row | {"contestant": "torch", "to_flax": 0.5, "allocated": None},
            ]
    lines = layer.verdict(rows)
    numbers = [re.findall(r"\d\.\d+", line) for line in lines]
    largest = ["0.80", "0.40", "0.6"], ["0.30", "0.15", "0.4"]
    assert numbers == [[], ["1.20"], ["2.40"], ["2.00"], ["1.10"], *largest]
    assert all("(forward, 64x2 float32" in line for line in (lines[1], lines[2], lines[4]))
    without = [row for row in rows if row["contestant"] != "torch"]
    assert len(layer.verdict(without)) == len(lines) - 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"shapes": ("4x0",)},
        {"shapes": ("4",)},
        {"shapes": ("4,x2",)},
        {"shapes": ()},
        {"dtypes": ("int8",)},
        {"dtypes": ()},
        {"rounds": 0},
    ],
)
def test_flags_are_checked(wrong):
    with pytest.raises(UserError):
        layer.Config(**wrong)
