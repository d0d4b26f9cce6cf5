"""One run, one grid: the same records whichever way the devices share the work."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from results import timeless

from bn_jax.errors import UserError
from bn_jax.lab.data import batch_indices, load
from bn_jax.lab.models import CNN, MLP
from bn_jax.lab.sweeps import Budget, Point, sweep, threaded
from bn_jax.lab.sweeps.layouts import MODES, Batch, Grid, automatic, layout
from bn_jax.lab.training.run import Run, Swept
from bn_jax.linen import BatchNorm, GhostBatchNorm

# Of 60 examples eight devices get 8 each, four of them masked.
BUDGET = Budget(steps=20, eval_every=10)
POINTS = [Point(0.1, 1.0, 0.9), Point(0.3, 1.0, 0.5), Point(0.1, 0.5, 0.5)]


@functools.cache
def digits():
    return load("digits", train_examples=300)


def build(family=MLP, features=(16, 8), batch=60, layer=BatchNorm):
    def network(swept, axis_name=None):
        norm = functools.partial(layer, momentum=swept.momentum, axis_name=axis_name)
        # Smooth: a relu that turns by rounding would be a difference of its own.
        return family(features, 10, norm=norm, activation="tanh")

    def batches(key, first_step, num_steps):
        return batch_indices(key, first_step, num_steps, 300, batch)

    return Run(network, optax.sgd, digits().scaled, batches)


def train(run, parallel, points=POINTS[:1], seeds=(0,), **options):
    """The records, and the last parameters and statistics of every run."""
    kept = {}

    def see(evaluation):
        for place, point, seed in evaluation.chunk.wanted:
            kept[point, seed] = jax.tree.map(np.asarray, evaluation.state(*place).train[:3])

    done = sweep(
        run, digits(), points, seeds, BUDGET, parallel=parallel, on_evaluation=see, **options
    )
    return [timeless(r) for rs in done for r in rs], kept


@functools.cache
def alone(*network):
    return train(build(*network), "single")


def assert_close(found, expected, tolerance=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found, expected,
    )  # fmt: skip


WHOLE = (MLP, (16, 8), 60, BatchNorm), (CNN, (4, 8), 60, BatchNorm)
# Groups within a device, and of two devices.
WITHIN = MLP, (16, 8), 128, functools.partial(GhostBatchNorm, group_size=8)
SPANNING = MLP, (16, 8), 64, functools.partial(GhostBatchNorm, group_size=16)


@pytest.mark.parametrize(
    ("mode", "network"),
    [
        *itertools.product(MODES, WHOLE[:1]),
        *(pytest.param(mode, WHOLE[1], marks=pytest.mark.long) for mode in MODES),
        pytest.param("pmap", WITHIN, marks=pytest.mark.long),
        ("pmap", SPANNING),
        ("shard_map", SPANNING),
    ],
)
def test_eight_devices_train_as_one_does(mode, network):
    expected_records, expected = alone(*network)
    records, found = train(build(*network), mode)
    # Rounding, which differs by processor, may turn which of two pixels is a pool's largest.
    tolerance = 1e-4 if network[0] is CNN else 2e-6
    assert_close(found, expected, tolerance)
    for record, other in zip(records, expected_records, strict=True):
        assert_close(record, other, tolerance)


@pytest.mark.parametrize(
    ("family", "features", "points", "seeds"),
    [
        pytest.param(MLP, (16, 8), POINTS, (0, 1, 2), marks=pytest.mark.long),
        (CNN, (4, 8), POINTS[:2], (3, 4)),
    ],
)
def test_a_grid_over_eight_devices_has_the_records_of_one(family, features, points, seeds):
    """Nine runs on eight devices; and four, of which a convolutional one is trained in turn."""
    run = build(family, features)
    expected, weights = train(run, "single", points, seeds)
    found, spread = train(run, "grid", points, seeds)
    assert len(found) == len(points) * len(seeds)
    for record, other in zip(found, expected, strict=True):
        assert_close(record, other, 2e-6)
    assert_close(spread, weights, 1e-6)


@pytest.mark.parametrize(
    ("family", "cores", "points", "seeds"),
    [
        ((MLP, (16, 8)), 2, 3, (0,)),
        ((CNN, (4, 8)), 4, 1, (0, 1, 2)),
        pytest.param((CNN, (4, 8)), 2, 1, (0, 1, 2), marks=pytest.mark.long),
    ],
)
def test_cores_have_the_records_of_one(family, cores, points, seeds, monkeypatch):
    """Runs that change cores half way, and fewer than there are."""
    monkeypatch.setattr(threaded, "cores", lambda: cores)
    run = build(*family)
    expected, weights = train(run, "single", POINTS[:points], seeds)
    found, spread = train(run, "cores", POINTS[:points], seeds)
    for record, other in zip(found, expected, strict=True):
        assert_close(record, other, 2e-6)
    assert_close(spread, weights, 1e-6)


def test_cores_are_those_of_a_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match=r"--parallel=cores is for a CPU"):
        layout("cores", 1, 8)


@pytest.mark.parametrize(
    ("points", "seeds", "block"),
    [(1, 8, (1, 8)), (8, 1, (8, 1)), (7, 5, (8, 1)), (2, 100, (2, 4)), (3, 3, (2, 4))],
)
def test_how_the_grid_is_divided(points, seeds, block):
    found = Grid(points, seeds).block
    assert found == block

    def largest(block):
        return -(-points // block[0]) * -(-seeds // block[1])

    assert all(largest(found) <= largest((8 // b, b)) for b in (1, 2, 4, 8))


def test_what_is_chosen():
    assert automatic(100, 1) == "single"
    assert automatic(100, 1, small=True) == "cores"
    assert automatic(1, 1, small=True) == "single"
    assert automatic(8, 8, small=True) == "grid"
    assert automatic(8, 8) == "grid"
    assert automatic(7, 8) == "pmap"
    assert automatic(7, 8, processes=2) == "shard_map"
    with pytest.raises(
        UserError, match="--parallel=pmpa: choose from auto, single, cores, grid"
    ):
        layout("pmpa", 1, 1)


@pytest.mark.parametrize(("layers", "mode"), [(1, "pmap"), (2, "shard_map")])
def test_collectives_of_a_step(layers, mode):
    """One for gradients and metrics; for each norm two forwards and one backwards."""
    run, devices = build(MLP, (8,) * layers, 64), Batch(mode)
    swept, data = Swept(*map(np.float32, POINTS[0])), devices.put(digits().train, "all")
    state = jax.eval_shape(run.init, jax.random.key(0), swept, data.inputs)
    rows = devices.put(np.arange(64, dtype=np.int32), "rows")

    def step(state, swept, split, rows, axis_name):
        return run.step(state, swept, split, rows, axis_name=axis_name)

    kinds = ("all", "all", "all", "rows")
    text = devices.program(step, kinds).lower(state, swept, data, rows).compile().as_text()
    assert text.count(" all-reduce(") == 1 + 3 * layers
    assert "all-gather" not in text


def test_runs_of_a_grid_are_picked_by_one_program(caplog):
    """A watcher looks at every run after every evaluation."""
    devices = Grid(2, 4)
    runs = devices.put({"w": np.arange(8.0).reshape(2, 4)}, "run")
    with jax.log_compiles():
        picked = [float(devices.own(runs, i, j)["w"]) for i in range(2) for j in range(4)]
    assert picked == list(range(8))
    assert caplog.text.count("Finished XLA compilation") == 1
