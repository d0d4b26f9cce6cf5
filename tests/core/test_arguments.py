"""Arguments beside x: every form that means the same does the same, and the rest is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from bn_jax import (
    BatchStats,
    batch_norm,
    batch_renorm,
    debiased_ema,
    domain_batch_norm,
    domain_normalize,
    ema,
    ghost_batch_norm,
    moments,
    normalize,
)

RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, (4, 4, 4)).astype(np.float32)
EPSILON = np.float32([0.1, 1, 5, 20])
STATS = BatchStats(jnp.arange(4.0), jnp.arange(1.0, 5.0), jnp.int32(0))
DOMAIN = jnp.asarray([0, 1, 1, 0])


def unnamed_axis_of_vmap(x, **options):
    return jax.vmap(lambda x: batch_norm(x, axis_name="i", **options)[0], axis_name="i")(x)


NORMS = {
    "batch_norm": lambda x, **o: batch_norm(x, **o)[0],
    "normalize": lambda x, **o: normalize(x, STATS.mean, STATS.var, **o),
    "ghosts": lambda x, **o: ghost_batch_norm(x, group_size=2, **o)[0],
    "uneven ghosts": lambda x, **o: ghost_batch_norm(x, group_size=3, allow_single=True, **o)[
        0
    ],
    "renorm": lambda x, **o: batch_renorm(x, STATS, **o)[0],
    "domains": lambda x, **o: domain_batch_norm(x, DOMAIN, 2, **o)[0],
    "domain_normalize": lambda x, **o: domain_normalize(
        x, DOMAIN, jnp.stack([STATS.mean] * 2), jnp.stack([STATS.var] * 2), **o
    ),
    "vmap": unnamed_axis_of_vmap,
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@every_norm
def test_an_epsilon_per_feature_goes_along_the_feature_axis(norm):
    whole = norm(X, epsilon=EPSILON)
    for c, epsilon in enumerate(EPSILON):
        np.testing.assert_allclose(whole[..., c], norm(X, epsilon=epsilon)[..., c], 1e-5, 1e-5)
    if norm is not unnamed_axis_of_vmap:
        turned = norm(np.moveaxis(X, -1, 1), axis=1, epsilon=EPSILON)
        np.testing.assert_allclose(np.moveaxis(turned, 1, -1), whole, 1e-5, 1e-5)


@pytest.mark.parametrize("axis", [-1, 0])
def test_gradients_of_an_epsilon_per_feature(axis):
    x = np.float64(X[0])
    dy = RNG.normal(size=x.shape)
    y, vjp = jax.vjp(lambda e: batch_norm(X[0], axis=axis, epsilon=e)[0], EPSILON)
    (got,) = vjp(np.float32(dy))
    for c, e in enumerate(EPSILON):
        row, g = (np.moveaxis(v, axis, 0)[c] for v in (x, dy))
        want_y, _ = reference.batch_norm(row, axis=(), epsilon=e)
        want = reference.gradients(row[:, None], g[:, None], [0], [0], epsilon=e)
        np.testing.assert_allclose(np.moveaxis(y, axis, 0)[c], want_y, 1e-5, 1e-5)
        np.testing.assert_allclose(got[c], want.epsilon, 1e-4)


@pytest.mark.parametrize("name", ["batch_norm", "normalize", "ghosts"])
def test_an_epsilon_for_each_example(name):
    epsilon = np.float32([0.1, 1, 5, 20]).reshape(4, 1, 1) * np.ones((1, 1, 4), np.float32)
    got = NORMS[name](X, epsilon=epsilon)
    for i, e in enumerate(epsilon[:, 0, 0]):
        np.testing.assert_allclose(got[i], NORMS[name](X, epsilon=e)[i], 1e-5, 1e-5)


@every_norm
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2), (5, 4), (1, 4, 1, 4)])
def test_epsilons_of_another_shape_are_refused(norm, shape):
    with pytest.raises(ValueError, match="epsilon of shape"):
        norm(X, epsilon=np.ones(shape, np.float32))


@pytest.mark.parametrize("name", [n for n in NORMS if n != "vmap"])
@pytest.mark.parametrize(
    "axes",
    [iter, np.asarray, set, list, lambda a: (np.int64(v) for v in a)],
    ids=["iterator", "array", "set", "list", "generator"],
)
def test_axes_of_any_iterable(name, axes):
    x = X[:, :1]
    if name == "renorm":
        f = functools.partial(batch_renorm, stats=BatchStats.create((1, 4)))
    elif "normalize" in name:
        lead = (2,) if "domain" in name else ()
        base = domain_normalize if lead else normalize
        given = {"domain": DOMAIN} if lead else {}
        f = functools.partial(base, mean=jnp.zeros((*lead, 1, 4)), var=jnp.ones((*lead, 1, 4)))
        f = functools.partial(f, **given)
    else:
        f = NORMS[name]
    got, want = f(x, axis=axes([1, 2])), f(x, axis=(1, 2))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_an_axis_of_no_dimension():
    want = moments(X, axis=1).mean
    for axis in (np.int64(1), np.asarray(1), jnp.asarray(1)):
        np.testing.assert_array_equal(moments(X, axis=axis).mean, want)


@every_norm
@pytest.mark.parametrize(
    "activation",
    [jnp.sum, lambda v: v[..., :1], lambda v: v[None], lambda v: (v, v), lambda v: None],
    ids=["sum", "part", "more axes", "tuple", "none"],
)
def test_activations_that_change_the_shape_are_refused(norm, activation):
    domains = norm in (NORMS["domains"], NORMS["domain_normalize"])
    with pytest.raises(TypeError if domains else ValueError, match="activation"):
        norm(X, activation=activation)


@pytest.mark.parametrize("number", [0, -1, 2.0, "2", None, True, 2.5])
def test_numbers_of_groups_and_domains(number):
    error = ValueError if isinstance(number, int) and number is not True else TypeError
    with pytest.raises(error, match=r"group_size=.*whole number"):
        ghost_batch_norm(X, group_size=number)
    with pytest.raises(error, match=r"num_domains=.*whole number"):
        domain_batch_norm(X, DOMAIN, number)


def test_numbers_of_numpy():
    got, want = (ghost_batch_norm(X, group_size=n) for n in (np.int64(2), 2))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("bounds", [{"r_max": 0.5}, {"r_max": float("nan")}, {"d_max": -1}])
def test_bounds_of_renorm(bounds):
    (name,) = bounds
    with pytest.raises(ValueError, match=f"{name}="):
        batch_renorm(X, STATS, **bounds)


@pytest.mark.parametrize("estimator", [ema, debiased_ema])
def test_a_momentum_for_each_feature(estimator):
    momentum, batch = np.float32([0, 0.5, 0.9, 0.99]), moments(X)
    got = estimator(STATS, batch, momentum=momentum)
    for c, m in enumerate(momentum):
        want = estimator(STATS, batch, momentum=m)
        np.testing.assert_allclose((got.mean[c], got.var[c]), (want.mean[c], want.var[c]), 1e-6)
    for shape in [(1,), (3,), (4, 1), (1, 4)]:
        with pytest.raises(ValueError, match="momentum of shape"):
            estimator(STATS, batch, momentum=np.full(shape, 0.9, np.float32))


@pytest.mark.parametrize("name", ["mean", "var"])
def test_statistics_of_domains_of_another_shape_are_refused(name):
    for shape in [(), (4,), (3, 4), (2, 3)]:
        given = {"mean": jnp.zeros((2, 4)), "var": jnp.ones((2, 4)), name: jnp.ones(shape)}
        with pytest.raises(ValueError, match=r"of shape \(.*for . domains"):
            domain_normalize(X, DOMAIN, **given)
