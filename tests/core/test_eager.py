"""Calls outside `jit`: nothing is traced or compiled anew, and the numbers stay those of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import assert_close, make_linen, make_nnx

import bn_jax
from bn_jax.core import batch_norm as module

X = np.float32(np.random.default_rng(0).normal(size=(12, 3)))
MASK = np.arange(12)[:, None] < 7


@pytest.fixture
def work(monkeypatch):
    """A list that grows with every program compiled and every derivative traced."""
    found = []

    def traced(*args, **kwargs):
        found.append("tangent")
        return tangent(*args, **kwargs)

    def listener(event, duration, **_):
        found.append(event)

    tangent = module.tangent
    monkeypatch.setattr(module, "tangent", traced)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield found
    jax.monitoring.unregister_event_duration_listener(listener)


def losses(make):
    """Losses of x that are computed in all the ways that a layer has."""
    for name in ("BatchNorm", "GhostBatchNorm", "BatchRenorm"):
        fields = {"group_size": 4} if name == "GhostBatchNorm" else {}
        for activation in (None, jax.nn.relu, jax.nn.gelu):
            layer = make(name, activation=activation, **fields)
            variables = layer.init(X)
            for mask in (None, MASK):
                yield lambda x, layer=layer, variables=variables, mask=mask: sum(
                    jnp.sum(v**3) for v in jax.tree.leaves(layer.apply(variables, x, mask=mask))
                )


@pytest.mark.parametrize("make", [make_linen, make_nnx])
def test_nothing_is_traced_or_compiled_twice(make, work):
    for loss in losses(make):
        first = jax.value_and_grad(loss)(X)
        jax.value_and_grad(loss)(X)
        assert "tangent" in work
        work.clear()
        again = jax.value_and_grad(loss)(X + 0)
        assert not work
        assert_close(again, first, 0)
        assert_close(again, jax.jit(jax.value_and_grad(loss))(X), 1e-5)
        work.clear()


def test_calls_of_an_nnx_model_and_of_the_function(work):
    nnx_layer = make_nnx()
    layer = nnx.merge(nnx_layer.graph, nnx_layer.state)
    for _ in range(3):
        work.clear()
        nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2))(layer, X)
        jax.grad(lambda x: jnp.sum(bn_jax.batch_norm(x)[0] ** 2))(X)
        jax.jvp(lambda x: bn_jax.batch_norm(x)[0], (X,), (X,))
    assert not work


class Leaky:
    slope = 0.1

    def __call__(self, v):
        return jnp.where(v > 0, v, self.slope * v)


def test_what_an_activation_refers_to_may_change():
    activation = Leaky()
    plain, _ = bn_jax.batch_norm(X)
    for activation.slope in (0.1, 0.5):
        y, _ = bn_jax.batch_norm(X, activation=activation)
        np.testing.assert_allclose(y, activation(plain), 1e-6)


def test_an_activation_that_cannot_be_hashed():
    class Unhashable(Leaky):
        __hash__ = None

    y, _ = bn_jax.batch_norm(X, activation=Unhashable())
    np.testing.assert_allclose(y, Leaky()(bn_jax.batch_norm(X)[0]), 1e-6)


def test_the_program_is_inlined():
    def program(x):
        return bn_jax.batch_norm(x, activation=jax.nn.relu, mask=MASK)[0]

    jaxpr = jax.make_jaxpr(jax.grad(lambda x: program(x).sum()))(X)
    assert "_batch_norm" not in str(jaxpr)
