"""Settings that make no sense are refused in one line, by functions and by layers alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import make_linen, make_nnx

import bn_jax
from bn_jax import BatchStats, cumulative_mean, debiased_ema, ema, moments, normalize
from bn_jax.core import numbers
from bn_jax.core.presets import equinox_ema

X = np.float32(np.random.default_rng(0).normal(size=(8, 3)))
ESTIMATORS = [ema, debiased_ema, cumulative_mean, equinox_ema]
OUTSIDE = [1.5, -0.1, float("nan"), float("inf"), 2, np.float32(-1), jnp.bfloat16(1.5)]
NO_NUMBERS = [True, np.bool_(False), "0.9", [0.9], 1j, jnp.array(True), jax.random.key(0)]
SHAPES = [np.full(2, 0.5), jnp.full((1, 3), 0.5), np.full((3, 1), 0.5)]


def refused(error, name):
    # One line, to which JAX may add its own about tracebacks.
    return pytest.raises(error, match=rf"\A{name}[= ].*(\Z|\n-)")


def estimate(estimator, momentum):
    return estimator(BatchStats.create((3,)), moments(X), momentum=momentum)


def in_layer(make, name="BatchNorm", **fields):
    layer = make(name, **fields)
    return layer.apply(layer.init(X), X)


def everywhere(estimator, momentum):
    """What uses the estimator, alone and in layers."""
    yield functools.partial(estimate, estimator, momentum)
    for make in (make_linen, make_nnx):
        yield functools.partial(in_layer, make, estimator=estimator, momentum=momentum)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("momenta", "error"), [(OUTSIDE, ValueError), (NO_NUMBERS, TypeError), (SHAPES, ValueError)]
)
def test_momentum(estimator, momenta, error):
    for momentum in momenta:
        for call in everywhere(estimator, momentum):
            if momenta is SHAPES and estimator is cumulative_mean:
                continue  # it has no momentum
            with refused(error, "momentum"):
                call()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_momentum_goes_with_the_cumulative_mean_alone(estimator):
    for call in everywhere(estimator, None):
        if estimator is cumulative_mean:
            call()
        else:
            with refused(TypeError, "momentum"):
                call()


@pytest.mark.parametrize("estimator", [debiased_ema, equinox_ema])
def test_a_corrected_average_has_a_momentum_below_1(estimator):
    for call in everywhere(estimator, 1.0):
        with refused(ValueError, "momentum"):
            call()


@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
@pytest.mark.parametrize(
    "momentum", [0, 0.5, np.float64(0.5), jnp.bfloat16(0.5), np.array([0.1, 0.5, 0.9])], ids=str
)
def test_momenta_that_are_numbers(estimator, momentum):
    got = estimate(estimator, momentum)
    each = [estimate(estimator, float(m)) for m in np.broadcast_to(momentum, 3)]
    for i, want in enumerate(each):
        np.testing.assert_allclose(got.mean[i], want.mean[i], 1e-6)


def test_a_schedule_is_checked_where_it_is_evaluated():
    for call in everywhere(ema, lambda count: count + 1.5):
        with refused(ValueError, "momentum"):
            call()


def with_epsilon(epsilon):
    stats, ones = BatchStats.create((3,)), jnp.ones(3)
    domain = jnp.zeros(8, int)
    yield functools.partial(bn_jax.batch_norm, X, epsilon=epsilon)
    yield functools.partial(bn_jax.ghost_batch_norm, X, group_size=4, epsilon=epsilon)
    yield functools.partial(bn_jax.batch_renorm, X, stats, epsilon=epsilon)
    yield functools.partial(bn_jax.domain_batch_norm, X, domain, 1, epsilon=epsilon)
    yield functools.partial(normalize, X, ones, ones, epsilon=epsilon)
    for make in (make_linen, make_nnx):
        yield functools.partial(in_layer, make, epsilon=epsilon)


@pytest.mark.parametrize(
    ("epsilons", "error"),
    [
        ([-1e-5, float("nan"), float("inf"), np.float32(-1), jnp.float32("nan")], ValueError),
        ([None, True, "1e-5", [1e-5], 1j], TypeError),
    ],
)
def test_epsilon(epsilons, error):
    for epsilon in epsilons:
        for call in with_epsilon(epsilon):
            with refused(error, "epsilon"):
                call()


@pytest.mark.parametrize("make", [make_linen, make_nnx])
@pytest.mark.parametrize(
    ("layer", "name", "values", "error"),
    [
        ("GhostBatchNorm", "group_size", [0, -3], ValueError),
        ("GhostBatchNorm", "group_size", [True, 2.0, None, "4"], TypeError),
        ("GhostBatchNorm", "strided", [1, 2, None, "yes"], TypeError),
        ("BatchRenorm", "r_max", [0.5, -3, float("nan"), lambda count: 0.5], ValueError),
        ("BatchRenorm", "r_max", [True, None, "3", [3]], TypeError),
        ("BatchRenorm", "d_max", [-1, float("nan"), lambda count: -1.0], ValueError),
        ("BatchRenorm", "d_max", [False, None, 5j], TypeError),
    ],
)
def test_variants(make, layer, name, values, error):
    for v in values:
        with refused(error, name):
            in_layer(make, layer, **{name: v})


@pytest.mark.parametrize("make", [make_linen, make_nnx])
def test_construction_alone_refuses(make):
    for fields in ({"momentum": 1.5}, {"momentum": None}, {"epsilon": -1.0}):
        with refused((TypeError, ValueError), "(momentum|epsilon)"):
            make(**fields)


def test_bounds_may_be_infinite():
    stats = BatchStats.create((3,))
    y, _ = bn_jax.batch_renorm(X, stats, r_max=float("inf"), d_max=float("inf"))
    np.testing.assert_allclose(y, normalize(X, stats.mean, stats.var), 1e-5, 1e-6)


def test_a_traced_number_has_no_value_yet():
    def f(momentum, epsilon):
        return in_layer(make_linen, momentum=momentum, epsilon=epsilon)

    y, _ = jax.jit(f)(1.5, -1e-5)
    assert y.shape == X.shape
    with refused(TypeError, "momentum"):
        jax.jit(f)(True, 1e-5)


def test_what_is_not_on_this_process_is_not_read():
    class Elsewhere:
        dtype, shape, ndim, is_fully_addressable = jnp.dtype("float32"), (), 0, False

    numbers.check_momentum(Elsewhere())
