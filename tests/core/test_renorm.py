"""Batch renormalisation against Ioffe 2017, written down in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax

from bn_jax import BatchStats, batch_norm, batch_renorm, ema, normalize
from bn_jax.core.renorm import PAPER_D_MAX, PAPER_R_MAX

PLAIN = {"r_max": 1.0, "d_max": 0.0}
FREE = {"r_max": np.inf, "d_max": np.inf}


def draw(dtype=np.float64, shape=(8, 3)):
    """x, running statistics, scale, bias and a mask."""
    rng = np.random.default_rng(0)
    x = (2 * rng.normal(size=shape) + 1).astype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    mean, scale, bias = rng.normal(size=(3, shape[-1]))
    stats = BatchStats(jnp.asarray(mean, wide), jnp.asarray([1, 3, 5], wide), jnp.int32(7))
    mask = np.arange(shape[0])[:, None] != 2
    return x, stats, scale.astype(dtype), bias.astype(dtype), mask


def assert_close(got, want, tolerance):
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, got, want)


@pytest.mark.parametrize("options", [{}, {"mask": np.arange(8)[:, None] < 5}, {"scale": None}])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_without_a_correction_it_is_batch_norm_to_the_bit(dtype, options):
    x, stats, scale, bias, _ = draw(dtype)
    options = {"scale": scale, "bias": bias} | options
    results = [
        jax.vjp(functools.partial(f, **options), x)
        for f in (batch_norm, lambda x, **given: batch_renorm(x, stats, **given, **PLAIN))
    ]
    (want, want_vjp), (got, got_vjp) = results
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got[0].dtype == want[0].dtype == dtype
    ones = jax.tree.map(jnp.ones_like, want)
    (want_dx,), (got_dx,) = want_vjp(ones), got_vjp(ones)
    np.testing.assert_array_equal(got_dx, want_dx)
    assert got_dx.dtype == want_dx.dtype == dtype


@pytest.mark.parametrize("scale_dtype", [None, jnp.bfloat16, jnp.float32])
def test_dtype_is_that_of_batch_norm(scale_dtype):
    x, stats, *_ = draw(jnp.bfloat16)
    scale = None if scale_dtype is None else jnp.ones(3, scale_dtype)
    got, _ = batch_renorm(x, stats, scale)
    want, _ = batch_norm(x, scale)
    assert got.dtype == want.dtype
    exact = normalize(jnp.float32(x), stats.mean, stats.var)
    np.testing.assert_allclose(np.float32(got), exact, 1e-2, 1e-2)


def test_without_a_bound_it_is_inference(x64):
    x, stats, scale, bias, mask = draw()
    f = jax.jit(functools.partial(batch_renorm, mask=mask, **FREE))
    y, seen = f(x, stats, scale, bias)
    mean, var = np.asarray(stats.mean), np.asarray(stats.var)
    assert_close(y, reference.normalize(x, mean, var, scale, bias), 1e-12)
    want = reference.moments(x, mask=mask)
    assert_close((seen.mean, seen.var), (want.mean, want.var), 1e-12)


def corrections(mean, var, stats, r_max, d_max, epsilon):
    sigma = jnp.sqrt(stats.var + epsilon)
    r = jnp.clip(jnp.sqrt(var + epsilon) / sigma, 1 / r_max, r_max)
    return r, jnp.clip((mean - stats.mean) / sigma, -d_max, d_max)


def naive(x, stats, scale, bias, epsilon, mask, r_max, d_max):
    n = jnp.sum(mask)
    mean = jnp.sum(mask * x, 0) / n
    var = jnp.sum(mask * (x - mean[None]) ** 2, 0) / n
    r, d = lax.stop_gradient(corrections(mean, var, stats, r_max, d_max, epsilon))
    h = (x - mean[None]) / jnp.sqrt(var + epsilon)[None] * r[None] + d[None]
    return h * scale[None] + bias[None], mean, var


BOUNDS = [(1.0, 0.0), (1.2, 0.3), (3.0, 5.0), (1e9, 1e9)]


def test_gradients_are_those_of_the_naive_program(x64):
    x, stats, scale, bias, mask = draw()

    def ours(x, scale, bias, epsilon, r_max, d_max):
        y, seen = batch_renorm(
            x, stats, scale, bias, r_max=r_max, d_max=d_max, epsilon=epsilon, mask=mask
        )
        return y, seen.mean, seen.var

    def theirs(x, scale, bias, epsilon, r_max, d_max):
        return naive(x, stats, scale, bias, epsilon, mask, r_max, d_max)

    def loss(f, *arguments):
        y, mean, var = f(*arguments)
        return jnp.sum(jnp.sin(y)) + jnp.sum(mean * var), (y, mean, var)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, f), range(4), has_aux=True))
        for f in (ours, theirs)
    )
    for bounds in BOUNDS:
        arguments = x, scale, bias, 0.1, *bounds
        assert_close(ours(*arguments), theirs(*arguments), 1e-8)


def test_both_ends_are_clipped():
    """Batches of r = 4, 1/4, 1.5 and d = 4, -4, 1, without epsilon."""
    h = np.float32([-1, 1, -1, 1])[:, None]
    x = h * np.float32([4, 0.25, 1.5]) + np.float32([4, -4, 1])
    stats = BatchStats(jnp.zeros(3), jnp.ones(3), jnp.int32(0))
    for r_max, d_max, r, d in [
        (2, 3, [2, 0.5, 1.5], [3, -3, 1]),
        (5, 0.5, [4, 0.25, 1.5], [0.5, -0.5, 0.5]),
        (1, 9, [1, 1, 1], [4, -4, 1]),
    ]:
        y, _ = batch_renorm(x, stats, r_max=r_max, d_max=d_max, epsilon=0)
        np.testing.assert_allclose(y, h * np.float32(r) + np.float32(d), 1e-6, 1e-6)


@pytest.mark.parametrize(
    ("updates", "r_max", "d_max"),
    [
        (0, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (22_500, 2, 5 * 17.5 / 20),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (1_000_000, 3, 5),
    ],
)
def test_schedules_of_the_paper(updates, r_max, d_max):
    """Section 4: 1 and 0 up to step 5,000, to 3 by step 40,000 and 5 by 25,000."""
    count = jnp.int32(updates)
    np.testing.assert_allclose(PAPER_R_MAX(count), r_max, 1e-6)
    np.testing.assert_allclose(PAPER_D_MAX(count), d_max, 1e-6)


def test_nothing_to_be_corrected_by():
    x, stats, *_ = draw(np.float32)
    y, seen = batch_renorm(x, stats, mask=jnp.zeros((8, 1)))
    assert_close(y, batch_norm(x, mask=jnp.zeros((8, 1)))[0], 1e-6)
    after = ema(stats, seen)
    jax.tree.map(np.testing.assert_array_equal, after, stats)


def test_constant_features_and_batches_like_the_statistics():
    # Where d is 0 its clipping divides by its size.
    x = jnp.ones((4, 2))
    stats = BatchStats(jnp.float32([1, 0]), jnp.zeros(2), jnp.int32(0))
    value_and_grad = jax.value_and_grad(lambda x: jnp.sum(batch_renorm(x, stats)[0]))
    value, dx = jax.jit(value_and_grad)(x)
    assert value == 4 * 5  # 0 of the first, d_max of the second
    np.testing.assert_array_equal(dx, np.zeros((4, 2)))


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex(dtype, x64):
    rng = np.random.default_rng(0)
    x, mean = rng.normal(size=(2, 2, 8, 3)).astype(np.finfo(dtype).dtype)
    x, mean = (x[0] + 1j * x[1]).astype(dtype), (mean[0, 0] + 1j * mean[1, 0]).astype(dtype)
    stats = BatchStats(jnp.asarray(mean), jnp.asarray([1, 2, 3], x.real.dtype), jnp.int32(0))
    tolerance = 100 * np.finfo(dtype).eps
    y, _ = batch_renorm(x, stats, **FREE)
    assert y.dtype == dtype
    std = np.sqrt(np.asarray(stats.var, np.float64) + 1e-5)
    assert_close(y, (x - mean) / std, tolerance)
    # The absolute value of d is clipped, and its angle kept.
    y, seen = batch_renorm(x, stats, r_max=1.0, d_max=0.1)
    away = x.mean(0) - mean
    d = away / np.maximum(np.abs(away) / 0.1, std)
    assert_close(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + d, tolerance)
    assert np.any(np.abs(away) / std > 0.1)
    assert seen.mean.dtype == dtype


# pmap is shard_map(check_vma=False) since JAX 0.8, so one of them will do.
@pytest.mark.parametrize("replicate", ["pmap", "vmap", "shard_map"], indirect=True)
def test_devices_correct_by_what_they_share(replicate):
    x, stats, scale, bias, _ = draw(np.float32, (16, 3))
    mask = np.arange(16)[:, None] % 5 > 0
    options = {"r_max": 1.2, "d_max": 0.3}

    def one(x, mask):
        return batch_renorm(x, stats, scale, bias, mask=mask, axis_name="batch", **options)

    def loss(x):
        y, seen = replicate(one)(x.reshape(4, 4, 3), mask.reshape(4, 4, 1))
        return jnp.sum(jnp.sin(y)), (y.reshape(16, 3), seen.mean[0], seen.var[3])

    def alone(x):
        y, seen = batch_renorm(x, stats, scale, bias, mask=mask, **options)
        return jnp.sum(jnp.sin(y)), (y, seen.mean, seen.var)

    got, want = (jax.jit(jax.grad(f, has_aux=True))(x) for f in (loss, alone))
    assert_close(got, want, 1e-5)


def test_refused():
    x, stats, *_ = draw(np.float32)
    with pytest.raises(ValueError, match=r"mean of shape \(3,\)"):
        batch_renorm(x[:, :2], stats)
    with pytest.raises(ValueError, match="one element per feature"):
        batch_renorm(x[:1], stats)
    with pytest.raises(ValueError, match=r"scale of shape \(2,\)"):
        batch_renorm(x, stats, jnp.ones(2))
