"""Schedules, decay, clipping and label smoothing against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.lab.training.metrics import cross_entropy
from bn_jax.lab.training.optimizers import RULES, optimizer
from bn_jax.lab.training.schedules import SCHEDULES, schedule

STEPS = 90
EXPECTED = {
    "constant": lambda t: 1.0,
    "step": lambda t: 0.1 ** (t // 30),
    "exponential": lambda t: 0.1 ** (t / 30),
    "inverse": lambda t: 1 / (1 + 0.1 * t / 30),
    "cosine": lambda t: (1 + math.cos(math.pi * t / 90)) / 2,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_schedule_is_its_formula(name):
    factor = schedule(name, STEPS)
    for t in (0, 1, 29, 30, 45, 89):
        assert float(factor(t)) == pytest.approx(EXPECTED[name](t), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_begins_after_its_warm_up(name):
    factor = schedule(name, STEPS, warmup_steps=30, decay_steps=7, decay_rate=0.5)
    rest = schedule(name, STEPS - 30, decay_steps=7, decay_rate=0.5)
    for t in (0, 3, 29):
        assert float(factor(t)) == pytest.approx(t / 30)
    for t in (30, 31, 50, 89):
        assert float(factor(t)) == pytest.approx(float(rest(t - 30)), rel=1e-6)


PARAMS = {"Dense_0": {"kernel": jnp.array([2.0, -4.0]), "bias": jnp.array([3.0])}}
GRADS = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)


def first_update(**settings):
    tx = optimizer("sgd", 0.1, **settings)
    update, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    return {k: np.asarray(v) for k, v in update["Dense_0"].items()}


@pytest.mark.parametrize("kind", ["l2", "weight_decay"])
def test_decay_is_of_kernels_alone_unless_told(kind):
    kernels, everything = (
        first_update(**{kind: 0.3}),
        first_update(**{kind: 0.3}, decay_norms=True),
    )
    for found in (kernels, everything):
        np.testing.assert_allclose(found["kernel"], [-0.1 * 1.1, 0.1 * 0.7], rtol=1e-6)
    np.testing.assert_allclose(kernels["bias"], [-0.05], rtol=1e-6)
    np.testing.assert_allclose(everything["bias"], [-0.1 * 1.4], rtol=1e-6)


def test_l2_goes_through_the_rule_and_weight_decay_does_not():
    def kernel(**settings):
        tx = optimizer("adam", 0.1, **settings)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]["Dense_0"]["kernel"]

    # Adam's first step is the sign of the gradient.
    np.testing.assert_allclose(kernel(l2=0.3), [-0.1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(kernel(weight_decay=0.3), [-0.16, 0.02], rtol=1e-4)


def test_the_gradient_is_clipped_as_a_whole():
    found = np.concatenate(list(first_update(clip=0.2).values()))
    assert np.linalg.norm(found) == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_rate_and_its_schedule_multiply(name):
    def second(rate, factor):
        tx = optimizer(name, rate, schedule=factor)
        state = tx.init(PARAMS)
        for _ in range(2):
            update, state = tx.update(GRADS, state, PARAMS)
        return update["Dense_0"]["kernel"]

    falling = schedule("step", 90, decay_steps=1, decay_rate=0.25)
    np.testing.assert_allclose(second(0.4, falling), second(0.1, None), rtol=1e-6)


@pytest.mark.parametrize("classes", [1, 5])
def test_smoothed_labels_are_a_mixture(classes):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(12, classes)).astype(np.float32)
    labels = np.arange(12) % max(classes, 2)
    every = np.stack([cross_entropy(outputs, np.full(12, k)) for k in range(max(classes, 2))])
    expected = 0.7 * cross_entropy(outputs, labels) + 0.3 * every.mean(0)
    found = cross_entropy(jnp.array(outputs), jnp.array(labels), 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
