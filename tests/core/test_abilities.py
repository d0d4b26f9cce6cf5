"""What `batch_norm` can do beyond its equation, each against the oracle or a composition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax

from bn_jax import (
    batch_norm,
    moments,
    normalize,
)
from bn_jax.core.sync import sync_once

SHAPE = (6, 2, 2, 3)
RNG = np.random.default_rng(0)
X, DY = 2 * RNG.normal(size=(2, *SHAPE)) + 1
MASK = np.array([1, 0, 0.3, 2, 1, 0]).reshape(6, 1, 1, 1)
EXAMPLE, POSITION = (6, 1, 1, 3), (1, 2, 2, 3)


def assert_close(got, want, tolerance=1e-12):
    for v, w in zip(got, want, strict=True):
        np.testing.assert_allclose(v, w, tolerance, tolerance)


def to_shape(v, shape):
    """Summed over the axes along which `shape` is 1."""
    axes = tuple(a for a, (n, m) in enumerate(zip(v.shape, shape, strict=True)) if m < n)
    return v.sum(axes, keepdims=True)


@pytest.mark.parametrize(
    ("scale_shape", "bias_shape"), [(EXAMPLE, EXAMPLE), (POSITION, (3,)), ((3,), SHAPE)]
)
def test_scale_and_bias_of_x_s_rank(scale_shape, bias_shape, x64):
    scale, bias = RNG.normal(size=scale_shape), RNG.normal(size=bias_shape)

    def f(x, scale, bias):
        return batch_norm(x, scale, bias, mask=MASK)[0]

    y, vjp = jax.vjp(jax.jit(f), X, scale, bias)
    h, _ = reference.batch_norm(X, mask=MASK)
    wide = np.broadcast_to(scale, SHAPE)
    assert_close([y], [wide * h + bias])
    none = np.zeros(3)
    dx = reference.gradients(X, DY * wide, none, none, mask=MASK).x
    full = ((1,) * (4 - v.ndim) + v.shape for v in (scale, bias))
    vectors = (to_shape(v, s) for v, s in zip((DY * h, DY), full, strict=True))
    got_dx, *got = vjp(DY)
    want = [v.reshape(w.shape) for v, w in zip(vectors, (scale, bias), strict=True)]
    assert_close((got_dx, *got), (dx, *want), 1e-11)


@pytest.mark.parametrize("shape", [(5, 1, 1, 3), (6, 1, 1, 1), (6, 1, 3), (1, 1, 1, 2)])
@pytest.mark.parametrize("name", ["scale", "bias"])
def test_values_that_do_not_fit_are_refused(name, shape):
    with pytest.raises(ValueError, match=name):
        batch_norm(jnp.ones(SHAPE), **{name: jnp.ones(shape)})


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.gelu])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_x_is_kept_for_the_backward_pass(dtype, activation, mask):
    x = jnp.asarray(X, dtype)

    @jax.jit
    def f(x, scale, bias):
        return batch_norm(x, scale, bias, mask=mask, activation=activation)[0]

    _, vjp = jax.vjp(f, x, jnp.ones(3), jnp.zeros(3))
    (kept,) = (v for v in jax.tree.leaves(vjp) if v.size >= x.size)
    assert kept.dtype == dtype
    np.testing.assert_array_equal(kept, x)


@pytest.mark.parametrize("through", [(), ("mean",), ("var",), ("mean", "var")], ids=str)
def test_gradients_stopped_through_the_moments(through, x64):
    def f(x, scale, bias):
        seen = moments(x, mask=MASK)
        stopped = {
            name: v if name in through else lax.stop_gradient(v)
            for name, v in seen._asdict().items()
            if name in ("mean", "var")
        }
        return normalize(x, **stopped, scale=scale, bias=bias)

    scale, bias, none = RNG.normal(size=3), RNG.normal(size=3), np.zeros(3)
    y, vjp = jax.vjp(jax.jit(f), X, scale, bias)
    want = reference.gradients(X, DY, none, none, scale, mask=MASK, through=through)
    assert_close(vjp(DY), want[:3], 1e-11)
    assert_close([y], [reference.batch_norm(X, scale, bias, mask=MASK)[0]])


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 3), -1), ((1, 1, 1, 3), -1), ((3, 2), (0, 1)), ((2, 1), 0)]
)
def test_one_element_per_feature(shape, axis):
    x = jnp.full(shape, 7.0)
    with pytest.raises(ValueError, match="one element per feature"):
        batch_norm(x, axis=axis)
    bias = jnp.ones(reference.features(shape, axis))
    y, seen = batch_norm(x, bias=bias, axis=axis, allow_single=True)
    np.testing.assert_array_equal(y, jnp.ones(shape))
    np.testing.assert_array_equal(seen.mean, 7 * bias)
    np.testing.assert_array_equal(seen.var, 0 * bias)


@pytest.mark.parametrize("sync", [None, sync_once])
def test_one_element_on_each_replica(sync):
    options = {} if sync is None else {"sync": sync}
    x = jnp.arange(12.0).reshape(4, 1, 3)

    def f(groups):
        return lambda x: batch_norm(x, axis_name="batch", axis_index_groups=groups, **options)[
            0
        ]

    y = jax.vmap(f(None), axis_name="batch")(x)
    want, _ = reference.batch_norm(np.arange(12.0).reshape(4, 3))
    np.testing.assert_allclose(y[:, 0], want, 1e-5)
    for groups, replicas in [(None, x[:1]), ([[0, 1, 2], [3]], x)]:
        with pytest.raises(ValueError, match="one element per feature"):
            jax.vmap(f(groups), axis_name="batch")(replicas)
