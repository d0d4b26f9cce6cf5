"""A step whose loss or gradient is not finite changes nothing, and is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.lab.models import MLP
from bn_jax.lab.training.skip import undo_nonfinite
from bn_jax.lab.training.step import init_state, train_step
from bn_jax.linen import BatchNorm

MODEL = MLP((4,), 3, norm=functools.partial(BatchNorm, momentum=0.9))
OPTIMIZER = optax.adam(0.1)
step = jax.jit(train_step, static_argnums=(3, 4))
INPUTS = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
LABELS = np.arange(6) % 3


def start():
    return init_state(jax.random.key(0), MODEL, OPTIMIZER, jnp.array(INPUTS))


def poisoned(value):
    inputs = INPUTS.copy()
    inputs[2, 3] = value
    return jnp.array(inputs)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_a_bad_batch_changes_nothing(value):
    good, _ = step(start(), jnp.array(INPUTS), LABELS, MODEL, OPTIMIZER)
    after, _ = step(good, poisoned(value), LABELS, MODEL, OPTIMIZER)
    assert_same(after[1:4], good[1:4])
    assert (after.step, after.skipped) == (2, 1)
    # Without it the statistics would have been lost: that is what this guards against.
    variables = {"params": good.params, "batch_stats": good.batch_stats}
    _, lost = MODEL.apply(variables, poisoned(value), train=True, mutable=["batch_stats"])
    assert not all(np.isfinite(v).all() for v in jax.tree.leaves(lost))


def test_a_finite_loss_with_an_infinite_gradient():
    # The derivative of sqrt at 0.
    def loss(w):
        return jnp.sqrt(w).sum()

    w = jnp.array([0.0, 1.0])
    value, grad = jax.value_and_grad(loss)(w)
    assert np.isfinite(value)
    assert not np.isfinite(grad).all()
    after, undone = undo_nonfinite({"w": w}, {"w": w - grad}, value, grad)
    assert undone
    assert_same(after, {"w": w})


def test_whole_numbers_are_finite_and_kept_in_their_dtype():
    before, after = {"n": jnp.int32(1)}, {"n": jnp.int32(2)}
    kept, undone = undo_nonfinite(before, after, {"n": jnp.int32(3)})
    assert not undone
    assert kept["n"] == 2
    assert kept["n"].dtype == jnp.int32


def test_each_run_of_a_sweep_decides_for_itself():
    inputs = jnp.stack([jnp.array(INPUTS), poisoned(np.nan)])
    states = jax.tree.map(lambda v: jnp.stack([v, v]), start())
    one = functools.partial(train_step, model=MODEL, optimizer=OPTIMIZER)
    after, _ = jax.jit(jax.vmap(one, (0, 0, None)))(states, inputs, LABELS)
    np.testing.assert_array_equal(after.skipped, [0, 1])
    changed = jax.tree.map(lambda a, b: np.any(a != b, axis=tuple(range(1, a.ndim))), *(
        (s.params, s.batch_stats) for s in (after, states)
    ))  # fmt: skip
    assert all(c[0] and not c[1] for c in jax.tree.leaves(changed))


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_replicas_decide_together(value):
    """Only the second of three devices has the example that is bad."""
    model = MLP((4,), 3, norm=functools.partial(BatchNorm, axis_name="device"))
    one = functools.partial(train_step, model=model, optimizer=OPTIMIZER, axis_name="device")
    before, parts = start(), [v.reshape(3, 2, *v.shape[1:]) for v in (poisoned(value), LABELS)]
    after, _ = jax.pmap(one, "device", in_axes=(None, 0, 0))(before, *parts)
    np.testing.assert_array_equal(after.skipped, [1, 1, 1])
    assert_same(after[1:4], jax.tree.map(lambda v: jnp.stack([v] * 3), before[1:4]))
