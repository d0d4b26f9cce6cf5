"""A variance beyond the largest number is infinite, and what is divided by it is NaN: seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import (
    BatchStats,
    batch_norm,
    batch_renorm,
    domain_batch_norm,
    domain_normalize,
    ema,
    ghost_batch_norm,
    moments,
    normalize,
)
from bn_jax.core.arrays import inverse_std

X = np.random.default_rng(0).normal(2, 3, (8, 3)).astype(np.float32)
HUGE = X * np.float32([1, 1e30, 1])
STATS = BatchStats.create((3,))
OVERFLOWN = ema(STATS, moments(HUGE), momentum=0.5)
DOMAIN = jnp.arange(8) % 2
TRAINING = {
    "batch_norm": lambda x, **o: batch_norm(x, **o)[0],
    "mask": lambda x, **o: batch_norm(x, mask=np.arange(8)[:, None] > 2, **o)[0],
    "weights": lambda x, **o: batch_norm(x, mask=np.arange(8.0)[:, None], **o)[0],
    "ghosts": lambda x, **o: ghost_batch_norm(x, group_size=4, **o)[0],
    "renorm": lambda x, **o: batch_renorm(x, STATS, **o)[0],
    "domains": lambda x: domain_batch_norm(x, DOMAIN, 2)[0],
    "autodiff": lambda x, **o: normalize(x, *moments(x)[:2], **o),
    "over vmap": lambda x, **o: jax.vmap(
        lambda x: batch_norm(x, axis_name="i", **o)[0], axis_name="i"
    )(x.reshape(4, 2, 3)).reshape(8, 3),
}
INFERENCE = {
    "normalize": lambda x, stats, **o: normalize(x, *stats[:2], **o),
    "renorm": lambda x, stats, **o: batch_renorm(x, stats, **o)[0],
    "domains": lambda x, stats: domain_normalize(
        x, DOMAIN, *(jnp.stack([v, v]) for v in stats[:2])
    ),
}


def assert_seen(got, want):
    """NaN for the second feature, and for the others what it would be without."""
    assert np.all(np.isnan(got[..., 1]))
    np.testing.assert_allclose(got[..., ::2], want[..., ::2], 1e-5, 1e-6)


@pytest.mark.parametrize("how", [jax.jit, lambda f: f], ids=["jitted", "eager"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("norm", TRAINING)
def test_in_training(norm, relu, how):
    f, options = TRAINING[norm], {"activation": jax.nn.relu} if relu else {}
    if relu and norm == "domains":
        pytest.skip("it takes no activation")

    def both(x):
        y, vjp = jax.vjp(lambda x: f(x, **options), x)
        return y, vjp(jnp.cos(jnp.arange(24.0).reshape(8, 3)))[0]

    for got, want in zip(how(both)(HUGE), how(both)(X), strict=True):
        assert_seen(got, want)


@pytest.mark.parametrize("norm", INFERENCE)
def test_with_running_statistics_that_overflowed(norm):
    assert OVERFLOWN.var[1] == np.inf

    def both(stats):
        f = lambda x: INFERENCE[norm](x, stats)  # noqa: E731
        return f(X), jax.grad(lambda x: f(x).sum())(X)

    within = OVERFLOWN._replace(var=OVERFLOWN.var.at[1].set(1.0))
    for got, want in zip(jax.jit(both)(OVERFLOWN), jax.jit(both)(within), strict=True):
        assert_seen(got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_statistics_and_scale_and_bias(dtype):
    def loss(scale, bias):
        return jnp.sum(batch_norm(jnp.asarray(HUGE, dtype), scale, bias)[0] ** 2)

    grads = jax.grad(loss, (0, 1))(jnp.ones(3), jnp.ones(3))
    for v in grads:
        np.testing.assert_array_equal(np.isnan(v), [False, True, False])


def test_a_variance_within_the_range_is_as_it_was():
    var = jnp.float32([0, 1e-30, 1, 3e38, 0])
    got = inverse_std(var, jnp.float32(1e-5))
    np.testing.assert_array_equal(got, jax.lax.rsqrt(var + 1e-5))
    largest = np.float32([[1e18], [-1e18]])
    np.testing.assert_allclose(batch_norm(largest)[0], [[1], [-1]], 1e-5)
