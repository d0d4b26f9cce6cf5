"""Estimators beyond `ema`, each against its definition in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import BatchStats, Moments, cumulative_mean, debiased_ema, ema, moments
from bn_jax.core.population import algorithm_2, pooled

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 8, 3)) * [1, 5, 0.1] + RNG.normal(size=(5, 1, 3))
BATCHES = [moments(jnp.asarray(x, jnp.float32)) for x in X]
MEANS, VARS = X.mean(1), X.var(1)
EMPTY = Moments(jnp.zeros(3), jnp.zeros(3), jnp.float32(0))


def run(update, batches=BATCHES):
    return functools.reduce(update, batches, BatchStats.create((3,)))


def test_debiased_ema_reads_as_haiku_divides():
    """h <- m h + (1 - m) v from 0, read as h / (1 - m^t)."""
    hidden = np.zeros(3)
    for t, mean in enumerate(MEANS, start=1):
        hidden = 0.9 * hidden + 0.1 * mean
        got = run(functools.partial(debiased_ema, momentum=0.9), BATCHES[:t])
        np.testing.assert_allclose(got.mean, hidden / (1 - 0.9**t), 1e-5, 1e-6)


@pytest.mark.parametrize("estimator", [cumulative_mean, debiased_ema])
def test_a_feature_that_a_batch_lacks_has_one_update_less(estimator):
    first = Moments(jnp.full(2, 5.0), jnp.full(2, 4.0), jnp.array([4.0, 0]))
    second = first._replace(count=jnp.full(2, 4.0))
    stats = BatchStats.create((2,), per_feature=True)
    stats = estimator(estimator(stats, first), second)
    np.testing.assert_allclose(stats.mean, 5)
    np.testing.assert_allclose(stats.var, 4)
    np.testing.assert_array_equal(stats.count, [2, 1])


@pytest.mark.parametrize("update", [ema, debiased_ema, cumulative_mean])
def test_every_estimator_is_a_scan_carry(update):
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *BATCHES)
    scanned, _ = jax.lax.scan(
        lambda s, m: (update(s, m), None), BatchStats.create((3,)), stacked
    )
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(compare, scanned, run(update))


def test_algorithm_2_of_equal_batches_and_of_unequal_ones():
    got = algorithm_2(iter(BATCHES))
    np.testing.assert_allclose(got.mean, MEANS.mean(0), 1e-5, 1e-6)
    np.testing.assert_allclose(got.var, 8 / 7 * VARS.mean(0), 1e-5)
    # 12 + 4 examples, of facts where equal weights are far off: 3/4 and 1/4.
    parts = [X.reshape(-1, 3)[:12], X.reshape(-1, 3)[12:16]]
    got = algorithm_2([moments(jnp.asarray(p, jnp.float32)) for p in parts])
    want = 0.75 * parts[0].var(0, ddof=1) + 0.25 * parts[1].var(0, ddof=1)
    np.testing.assert_allclose(got.var, want, 1e-5)
    assert got.count == 16


def test_pooled_is_the_variance_of_everything():
    got = pooled(BATCHES)
    np.testing.assert_allclose(got.var, X.reshape(-1, 3).var(0), 1e-5)
    np.testing.assert_allclose(got.mean, X.reshape(-1, 3).mean(0), 1e-5, 1e-6)


@pytest.mark.parametrize("estimate", [algorithm_2, pooled])
def test_batches_without_elements_do_not_count_and_none_at_all_is_an_error(estimate):
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(compare, estimate([EMPTY, *BATCHES]), estimate(BATCHES))
    with pytest.raises(ValueError, match="no batches"):
        estimate([])
