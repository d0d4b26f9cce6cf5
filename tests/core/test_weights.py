"""What weights mean: how much an element tells, in any unit; and what tells of no variance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from strategies import LAYOUTS, cases, holds, make
from subjects import compiled, measure

from bn_jax import (
    BatchStats,
    Moments,
    batch_norm,
    cumulative_mean,
    debiased_ema,
    domain_batch_norm,
    ema,
    ghost_batch_norm,
    merge,
    moments,
)
from bn_jax.core.population import algorithm_2, pooled
from bn_jax.core.presets import equinox_ema
from bn_jax.core.running import has_variance, unbiased_var

ESTIMATORS = [ema, debiased_ema, cumulative_mean, equinox_ema]
X = np.random.default_rng(0).normal(2, 3, (32, 3)).astype(np.float32)
W = np.random.default_rng(1).choice([0, 0.2, 1, 3], (32, 1)).astype(np.float32)


def measure_unbiased(layout, x, mask):
    seen = measure(layout, x, mask)
    return unbiased_var(seen), has_variance(seen)


WEIGHTED = [v for v in LAYOUTS if v.mask in ("weights", "per feature")]


@holds(400, case=cases(WEIGHTED), unit=st.sampled_from([1, 1 / 48, 1e-20, 1e30]))
def test_the_unbiased_variance_is_that_of_pairs_in_any_unit(case, unit):
    layout, recipe = case
    v = make(layout, recipe._replace(offset=0))
    w = (v.mask * layout.wide.type(unit)).astype(layout.wide)
    var, known = compiled(measure_unbiased, layout)(v.x, w)
    want = reference.unbiased_by_pairs(v.clean, v.axis, v.mask)
    elements = reference.to_rows(v.mask > 0, v.x.shape, v.axis).sum(1)
    np.testing.assert_array_equal(np.ravel(np.broadcast_to(known, want.shape)), elements > 1)
    np.testing.assert_allclose(var, want, 1e-4, 1e-37)


def in_parts(x, w):
    return functools.reduce(merge, (moments(x[i::3], mask=w[i::3]) for i in range(3)))


def of_all(parts):
    return functools.reduce(merge, (Moments(*v) for v in zip(*parts, strict=True)))


def on_replicas(x, w):
    x, w = (v.reshape(4, 8, -1) for v in (x, w))
    seen = jax.vmap(lambda x, w: moments(x, mask=w, axis_name="i"), axis_name="i")(x, w)
    return jax.tree.map(lambda v: v[0], seen)


WHOLE = {
    "merged": in_parts,
    "pooled": lambda x, w: pooled([moments(x[:5], mask=w[:5]), moments(x[5:], mask=w[5:])]),
    "replicas": on_replicas,
    "ghost groups": lambda x, w: of_all(ghost_batch_norm(x, mask=w, group_size=5)[1]),
    "domains": lambda x, w: of_all(domain_batch_norm(x, jnp.arange(32) % 5, 5, mask=w)[1]),
}


@pytest.mark.parametrize("unit", [1, 1 / 32, 1e-15, 1e15])
@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
def test_parts_keep_what_the_unbiased_variance_needs(whole, unit):
    got = whole(X, unit * W)
    np.testing.assert_allclose(unbiased_var(got), reference.unbiased_by_pairs(X, mask=W), 1e-5)
    want = reference.moments(X, mask=unit * W)
    np.testing.assert_allclose(got.weight, want.weight[0], 1e-5)
    np.testing.assert_allclose(got.count, want.count[0], 1e-5)


ONE = np.arange(4)[:, None] == 2
SINGLE = {
    "a row": lambda x: batch_norm(x[2:3], allow_single=True)[1],
    "a valid example": lambda x: moments(x, mask=ONE),
    "a weight": lambda x: moments(x, mask=0.3 * ONE),
    "a weight beside which others are nothing": lambda x: moments(x, mask=ONE + 1e-7),
    "an example of a domain": lambda x: jax.tree.map(
        lambda v: v[1], domain_batch_norm(x, jnp.asarray([0, 0, 1, 0]), 2)[1]
    ),
    "a group of one": lambda x: jax.tree.map(
        lambda v: v[-1], ghost_batch_norm(x[:3], group_size=2, allow_single=True)[1]
    ),
    "one of two replicas": lambda x: jax.tree.map(
        lambda v: v[0],
        jax.vmap(lambda x, m: moments(x, mask=m, axis_name="i"), axis_name="i")(
            x.reshape(2, 2, 3), ONE.reshape(2, 2, 1)
        ),
    ),
}


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("single", SINGLE.values(), ids=SINGLE)
def test_one_element_has_a_mean_and_no_variance(single, estimator, unbiased):
    batch, stats = single(X[:4]), BatchStats.create((3,), per_feature=estimator is not ema)
    assert not np.any(has_variance(batch))
    np.testing.assert_array_equal(unbiased_var(batch), 0)
    np.testing.assert_allclose(batch.mean, X[2], 1e-5)
    options = {"momentum": 0.75} if estimator is ema else {}
    got = estimator(stats, batch, unbiased=unbiased, **options)
    np.testing.assert_array_equal(got.var, 1)
    np.testing.assert_array_equal(got.count, 0)
    np.testing.assert_allclose(got.mean, 0.25 * X[2] if estimator is ema else np.zeros(3), 1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_estimator_averages_a_variance_that_was_not_seen(estimator, unbiased):
    """And nothing of the first variance stays in an average over the batches alone."""
    update = functools.partial(estimator, unbiased=unbiased)
    single, batches = moments(X[:1]), [moments(X[i : i + 8]) for i in range(0, 32, 8)]
    start = BatchStats.create((3,))
    want = functools.reduce(update, batches, start)
    mixed = [single, *batches[:2], single, single, *batches[2:], single]
    got = functools.reduce(update, mixed, start)
    np.testing.assert_array_equal(got.var, want.var)
    assert got.count == want.count == 4
    if estimator is not ema:
        np.testing.assert_array_equal(got.mean, want.mean)


def test_an_average_per_feature_counts_the_variances_of_each():
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    stats = BatchStats.create((3,), per_feature=True)
    got = cumulative_mean(cumulative_mean(stats, moments(X[:2], mask=mask)), moments(X))
    np.testing.assert_array_equal(got.count, [2, 1, 1])
    np.testing.assert_allclose(got.var[1:], X.var(0)[1:], 1e-5)


def test_algorithm_2_of_batches_of_one_row():
    rows = [moments(x[None]) for x in X[:4]]
    none = algorithm_2(rows)
    assert not np.any(has_variance(none))
    np.testing.assert_allclose(none.mean, X[:4].mean(0), 1e-5)
    assert np.all(has_variance(pooled(rows)))
    some = algorithm_2([*rows, moments(X[4:16]), moments(X[16:20])])
    want = 0.75 * X[4:16].var(0, ddof=1) + 0.25 * X[16:20].var(0, ddof=1)
    np.testing.assert_allclose(some.var, want, 1e-5)
    np.testing.assert_allclose(some.mean, X[:20].mean(0), 1e-5)
    assert np.all(has_variance(some))
    assert some.count == 20


def test_moments_that_are_given_have_weights_of_1():
    given, seen = Moments(X[0], X[1] ** 2, jnp.float32(8)), moments(X[:8])
    np.testing.assert_allclose(unbiased_var(given), 8 / 7 * X[1] ** 2, 1e-6)
    assert merge(given, seen).weight == 1
    more = given._replace(count=jnp.float32(3))
    np.testing.assert_allclose(unbiased_var(more), 1.5 * X[1] ** 2, 1e-6)
    nothing = Moments(jnp.zeros(3), jnp.zeros(3), jnp.float32(0))
    whole, _ = jax.lax.scan(
        lambda m, x: (merge(m, moments(x)), None), nothing, X.reshape(4, 8, 3)
    )
    np.testing.assert_allclose(unbiased_var(whole), X.var(0, ddof=1), 1e-5)


def everything(w):
    """What depends on the weights: moments, y, its gradient, and running statistics."""
    seen = moments(X, mask=w)
    y, vjp = jax.vjp(lambda x: batch_norm(x, mask=w)[0], X)
    after = ema(BatchStats.create((3,)), seen, momentum=0.5)
    return *seen[:2], y, *vjp(jnp.sin(y)), after.mean, after.var


@pytest.mark.parametrize("how", [jax.jit, lambda f: f], ids=["jitted", "eager"])
@pytest.mark.parametrize("weight", [np.nan, -1.0, -1e-30, np.inf, -np.inf])
def test_weights_that_make_no_sense_are_seen_where_they_count(weight, how):
    w = np.broadcast_to(W, X.shape).copy()
    want = how(everything)(w)
    w[3, 1] = weight
    for v, right in zip(how(everything)(w), want, strict=True):
        assert np.all(np.isnan(v[..., 1]))
        np.testing.assert_array_equal(np.delete(v, 1, -1), np.delete(right, 1, -1))


def test_weights_that_make_no_sense_spread_no_further_than_their_part():
    w = W.copy()
    w[3] = -1
    _, domains = domain_batch_norm(X, jnp.arange(32) % 4, 4, mask=w)
    _, groups = ghost_batch_norm(X, group_size=8, mask=w)
    for seen, part in (domains, 3), (groups, 0):
        np.testing.assert_array_equal(np.isnan(seen.mean).all(1), np.arange(4) == part)
        np.testing.assert_array_equal(np.isnan(seen.var).any(1), np.arange(4) == part)
    whole = moments(X, mask=w)
    assert np.all(np.isnan(merge(moments(X), whole).mean))
    assert np.all(np.isnan(on_replicas(X, w).mean))
    assert np.all(np.isnan(algorithm_2([moments(X), whole]).var))


def test_features_have_units_of_their_own():
    w = W * np.float32([1e-38, 1, 3e36])
    for v, want in zip(everything(w), everything(W), strict=True):
        np.testing.assert_allclose(v, want, 1e-5, 1e-5)
    one = np.where(np.arange(32)[:, None] == 3, np.float32(3e38), 1)
    np.testing.assert_allclose(moments(X, mask=one).mean, X[3], 1e-6)


def test_sums_of_weights_beyond_float32_are_seen():
    seen = moments(X, mask=np.full((32, 1), np.float32(3e38)))
    np.testing.assert_allclose(seen.mean, X.mean(0), 1e-5)
    assert seen.count == np.inf
    assert np.all(np.isnan(merge(seen, seen).mean))
    np.testing.assert_allclose(moments(X, mask=1e37 * W).mean, moments(X, mask=W).mean, 1e-5)
    dx = jax.grad(lambda x: batch_norm(x, mask=np.full((32, 1), 3e38))[0].sum())(X)
    assert np.all(np.isnan(dx))
    nothing = moments(X[:1], mask=np.full((1, 1), np.float32(1e-39)))
    np.testing.assert_array_equal(np.concatenate([nothing.mean, nothing.var]), 0)
    assert nothing.count == 0


def test_weights_of_any_real_dtype():
    want = moments(X, mask=W > 0)
    for dtype in (jnp.int32, jnp.uint8, jnp.float16, jnp.bfloat16):
        got = moments(X, mask=jnp.asarray(W > 0, dtype))
        for v, right in zip(got, want, strict=True):
            np.testing.assert_allclose(v, right, 1e-6)
    with pytest.raises(TypeError, match="complex64"):
        moments(X, mask=jnp.ones((32, 1), jnp.complex64))
