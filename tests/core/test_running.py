import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from bn_jax.core.moments import Moments, moments
from bn_jax.core.running import BatchStats, ema


def draw(dtype=jnp.float32, moments_dtype=jnp.float32, count=8.0):
    """Statistics after 7 updates, and the moments of one batch."""
    rng = np.random.default_rng(0)
    mean, new_mean = rng.normal(size=(2, 3))
    var, new_var = rng.random((2, 3))
    stats = BatchStats(jnp.asarray(mean, dtype), jnp.asarray(var, dtype), jnp.int32(7))
    batch = Moments(*(jnp.asarray(v, moments_dtype) for v in (new_mean, new_var, count)))
    return stats, batch


def test_create():
    stats = BatchStats.create((2, 3), jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(stats.mean), np.zeros((2, 3)))
    np.testing.assert_array_equal(np.float32(stats.var), np.ones((2, 3)))
    assert (stats.mean.dtype, stats.var.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (stats.count, stats.count.dtype) == (0, jnp.int32)


def test_default_momentum_is_that_of_flax():
    stats, batch = draw()
    jax.tree.map(
        np.testing.assert_array_equal, ema(stats, batch), ema(stats, batch, momentum=0.99)
    )


@pytest.mark.parametrize("unbiased", [True, False])
def test_feature_of_count_0_keeps_its_statistics(unbiased):
    stats, _ = draw()
    x = jnp.asarray([[1.0, 2, jnp.nan], [3, 5, jnp.nan]])
    batch = moments(x, mask=jnp.asarray([[1, 1, 0], [1, 0, 0]]))
    got = ema(stats, batch, momentum=0.5, unbiased=unbiased)
    var = jnp.asarray([2.0 if unbiased else 1.0, 0, 0])
    means, variances = (stats.mean, batch.mean, [2, 1, 0]), (stats.var, var, [2, 0, 0])
    for v, (old, new, seen) in [(got.mean, means), (got.var, variances)]:
        np.testing.assert_allclose(v, reference.ema(old, new, 0.5, seen), rtol=1e-6)
        assert v[2] == old[2]


DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]


@pytest.mark.parametrize("moments_dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum_dtype", [None, *DTYPES])
def test_dtype_never_changes(dtype, moments_dtype, momentum_dtype, x64):
    stats, batch = draw(dtype, moments_dtype)
    momentum = 0.5 if momentum_dtype is None else jnp.asarray(0.5, momentum_dtype)

    def step(carry, _):
        return ema(carry, batch, momentum=momentum), None

    got, _ = jax.lax.scan(step, stats, length=3)
    assert [v.dtype for v in got] == [v.dtype for v in stats]
    mean = np.asarray(stats.mean, np.float64)
    for _ in range(3):
        mean = reference.ema(mean, batch.mean, 0.5, 8)
    tolerance = 4 * float(jnp.finfo(dtype).eps) + 1e-7
    np.testing.assert_allclose(np.asarray(got.mean, np.float64), mean, tolerance, tolerance)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["traced", "python"])
@pytest.mark.parametrize(("new", "kept"), [(4.5, 1.0), (100.0, 1.1015625)])
def test_momentum_that_bfloat16_rounds_to_1(jit, new, kept):
    # .999 + .0045 lies nearer to 1 than to the next number, 1.0078; 1 + .0045 does not.
    stats, batch = BatchStats.create((1,), jnp.bfloat16), Moments(*jnp.full((3, 1), new))
    got = jit(lambda m: ema(stats, batch, momentum=m))(0.999)
    assert float(got.var[0]) == kept


def test_bfloat16_statistics_follow_the_formula_rounded_once_a_step():
    stats, batch = BatchStats.create((64,), jnp.bfloat16), jnp.linspace(-50, 150, 64)
    for _ in range(5):
        want = 0.999 * np.float32(stats.var) + 0.001 * np.float32(batch)
        stats = ema(stats, Moments(batch, batch, jnp.float32(8)), momentum=0.999)
        np.testing.assert_allclose(np.float32(stats.var), want, rtol=2.0**-8)
        assert np.mean(np.float32(stats.var) == np.float32(jnp.bfloat16(want))) > 0.9
