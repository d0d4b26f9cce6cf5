import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.lab.models import ACTIVATIONS, CNN, MLP, NORMS
from bn_jax.linen import BatchNorm

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


def shapes(model):
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), IMAGES
    )
    return jax.tree.map(lambda v: v.shape, variables)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", [MLP, CNN])
@pytest.mark.parametrize("places", [("before",), ("after",), ("input",), ("input", "after")])
def test_every_norm_in_every_place(family, norm, places):
    model = family((6, 8), 5, norm=NORMS[norm], places=places)
    variables = model.init(jax.random.key(1), IMAGES, train=False)
    out, updates = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    assert out.shape == (4, 5)
    layers = 0 if norm == "none" else ("input" in places) + 2 * (places[-1] != "input")
    count = len(updates.get("batch_stats", {}))
    assert count == (layers if norm == "bn" else 0)


def test_bias_is_dropped_only_before_a_norm():
    without = shapes(MLP((6,), 5))["params"]
    before = shapes(MLP((6,), 5, norm=BatchNorm))["params"]
    after = shapes(MLP((6,), 5, norm=BatchNorm, places=("after",)))["params"]
    assert "bias" in without["Dense_0"]
    assert "bias" not in before["Dense_0"]
    assert "bias" in after["Dense_0"]
    assert all("bias" in p["Dense_1"] for p in (without, before, after))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norm_stands_before_or_after_the_activation(activation):
    """Against the two layers written out."""
    f = {"relu": nn.relu, "sigmoid": nn.sigmoid, "tanh": jnp.tanh, "elu": nn.elu,
         "gelu": nn.gelu}[activation]  # fmt: skip
    x = IMAGES.reshape(4, -1)

    def standardised(h):
        return (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5)

    for place in ("before", "after"):
        model = MLP((6,), 5, norm=BatchNorm, places=(place,), activation=activation)
        variables = model.init(jax.random.key(1), IMAGES, train=False)
        p = variables["params"]
        h = x @ p["Dense_0"]["kernel"]
        h = f(standardised(h)) if place == "before" else standardised(f(h))
        expected = h @ p["Dense_1"]["kernel"]
        out, _ = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(out, expected, atol=2e-4)


def test_evaluation_does_not_depend_on_the_batch():
    model = CNN((6, 8), 5, norm=BatchNorm)
    variables = model.init(jax.random.key(1), IMAGES, train=False)
    whole = model.apply(variables, IMAGES, train=False)
    np.testing.assert_allclose(
        model.apply(variables, IMAGES[:1], train=False), whole[:1], atol=1e-5
    )


def test_momentum_of_a_partial_norm_is_used():
    model = MLP((6,), 5, norm=functools.partial(BatchNorm, momentum=0.0))
    variables = model.init(jax.random.key(1), IMAGES, train=False)
    _, updates = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    h = IMAGES.reshape(4, -1) @ variables["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(
        updates["batch_stats"]["BatchNorm_0"]["mean"], h.mean(0), atol=1e-5
    )


def test_the_networks_of_the_sources_by_parameter_count():
    mnist = jax.random.normal(jax.random.key(0), (1, 28, 28, 1))
    model = MLP((100, 100, 100), 10, activation="sigmoid")
    count = jax.tree.reduce(
        lambda n, p: n + p.size, model.init(jax.random.key(0), mnist, train=False), 0
    )
    assert count == 78_500 + 2 * 10_100 + 1_010
