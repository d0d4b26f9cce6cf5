"""The layer's benchmark: it times what it says, and all contestants do the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contestants
from benchmarks.contestants import BOTH, FORWARD, TASKS
from bn_jax.lab.sweeps import timing


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
