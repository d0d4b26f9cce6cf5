"""What holds of `moments` and `batch_norm` for every input, sought against with Hypothesis."""

from unittest import mock

import jax
import numpy as np
import pytest
import reference
import tolerances
from hypothesis import strategies as st
from strategies import LARGE, LAYOUTS, VARIED, WIDE, cases, holds, make
from subjects import (
    both_modes,
    compiled,
    cotangents_of,
    differentiate,
    exact,
    exact_gradients,
    measure,
    normalise,
)
from tolerances import assert_close, assert_moments

from bn_jax.core.moments import Moments
from bn_jax.core.running import BatchStats, ema, skip_nonfinite


@pytest.fixture(scope="module", autouse=True)
def raw_sums_first_of_every_other_rank():
    """As of large arrays on one CPU."""
    with mock.patch("bn_jax.core.moments._raw_sums_first", lambda x: ("cpu",) * (x.ndim % 2)):
        yield


@holds(1500, case=cases(LAYOUTS + LARGE))
def test_moments(case):
    layout, v = case[0], make(*case)
    got = compiled(measure, layout)(v.x, v.mask)
    assert_moments(got, reference.moments(v.clean, v.axis, v.mask), v.elements)


@holds(1200, case=cases(LAYOUTS))
def test_batch_norm_and_its_gradient(case):
    layout, recipe = case
    v = make(layout, recipe)
    dy, dmean, dvar = cotangents_of(recipe, v, layout.relu)
    arguments = v.x, v.scale, v.bias, v.epsilon
    run = compiled(differentiate, layout)
    y, *seen, got = run(v.mask, arguments, (dy, dmean, dvar))
    want, want_seen = exact(v)
    dy = np.where(layout.relu & (want < 0), 0, dy.astype(np.float64))
    want = np.maximum(want, 0) if layout.relu else want
    assert_close(y, want, tolerances.of_y(v), "y", ~v.padded)
    assert_moments(Moments(*seen), want_seen, v.elements)
    want, allowed = (f(v, dy, dmean, dvar) for f in (exact_gradients, tolerances.of_gradients))
    for name, g, *rest in zip(want._fields, got, want, allowed, strict=True):
        if g is not None:
            assert_close(g, *rest, f"d{name}")


def dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.sum(np.multiply(u, w, dtype=np.float64)) for u, w in pairs)


# Wider, the derivative by epsilon can leave float32 where nothing is kept: r^3 (x - mean).
@holds(500, case=cases(WIDE, VARIED, exponents=(-12, 12)))
def test_forward_mode_is_the_transpose_of_reverse_mode(case):
    layout, recipe = case
    v = make(layout, recipe._replace(padding=None))
    rng, cotangents = np.random.default_rng(recipe.seed + 2), cotangents_of(recipe, v)
    arguments = v.x, v.scale, v.bias, v.epsilon
    units = 10.0**recipe.exponent, 1, 1, v.epsilon
    tangents = tuple(
        None if a is None else (unit * rng.normal(size=a.shape)).astype(a.dtype)
        for a, unit in zip(arguments, units, strict=True)
    )
    forward, reverse = compiled(both_modes, layout)(v.mask, arguments, tangents, cotangents)
    allowed = zip(tolerances.of_gradients(v, *cotangents), tangents, strict=True)
    allowed = sum(np.sum(a * np.abs(t)) for a, t in allowed if t is not None)
    # Each of the two may be off.
    assert abs(dot(forward, cotangents) - dot(reverse, tangents)) <= 2 * allowed


units = {"unit": st.sampled_from([1, -1, 3, -0.1, 1e3, 1e-3]), "zero": st.floats(-300, 300)}


@holds(500, case=cases(WIDE, VARIED, exponents=(-12, 12)), **units)
def test_the_unit_and_the_zero_of_x_do_not_matter(case, unit, zero):
    layout, recipe = case[0]._replace(scale=False, bias=False, relu=False), case[1]
    v = make(layout, recipe._replace(padding=None, kept=1))
    v = v._replace(epsilon=np.zeros_like(v.epsilon))
    x = unit * (v.clean.astype(np.float64) + zero * 10.0**recipe.exponent)
    other = v._replace(x=x.astype(layout.dtype), clean=x.astype(layout.dtype))
    run = compiled(normalise, layout)
    (y, mean, var), _ = run(v.mask, v.x, None, None, v.epsilon)
    (again, _, _), _ = run(v.mask, other.x, None, None, v.epsilon)
    allowed = tolerances.of_y(v) + tolerances.of_y(other)
    assert_close(again, np.sign(unit) * y, allowed, "y")
    back = reference.normalize(y, -mean / np.sqrt(var), 1 / var, axis=v.axis, epsilon=0)
    assert_close(v.x, back, allowed * np.sqrt(np.max(var)), "x")


@holds(300, case=cases(LAYOUTS, ["constant"]))
def test_constants_have_no_variance_and_become_the_bias(case):
    layout, recipe = case
    v = make(layout, recipe)
    cotangents = cotangents_of(recipe, v, layout.relu)
    run = compiled(differentiate, layout)
    y, mean, var, *_ = run(v.mask, (v.x, v.scale, v.bias, v.epsilon), cotangents)
    rounding = np.finfo(layout.wide).eps * mean.astype(np.float64)
    assert np.all((var >= 0) & (var <= rounding**2))
    want = reference.normalize(0 * v.clean, 0 * mean, 0 * var, None, v.bias, v.axis)
    want = np.maximum(want, 0) if layout.relu else want
    kept = np.broadcast_to(True if v.mask is None else v.mask > 0, y.shape)
    np.testing.assert_array_equal(y[kept], want[kept])


FLOAT32 = [layout for layout in LAYOUTS + LARGE if layout.dtype == "float32"]


# Up to where a sum of 4096 values, if not of their squares, is a float32.
@holds(300, case=cases(FLOAT32, VARIED, exponents=(17, 34)))
def test_variances_beyond_float32_are_infinite_and_can_be_skipped(case):
    layout, recipe = case
    v = make(layout, recipe._replace(padding=None, offset=0))
    got = Moments(*compiled(measure, layout)(v.x, v.mask))
    want = reference.moments(v.clean, v.axis, v.mask)
    beyond = ~np.isfinite(got.var)
    assert np.all(beyond[want.var > np.finfo(np.float32).max])
    np.testing.assert_array_equal(got.var[beyond], np.inf)
    within = [type(m)(*(np.where(beyond, 0, f) for f in m)) for m in (got, want)]
    assert_moments(*within, v.elements)
    after = ema(BatchStats.create(layout.features), skip_nonfinite(got), momentum=0)
    unseen = beyond | (want.count == 0)
    np.testing.assert_array_equal(after.mean, np.where(unseen, 0, got.mean))
    single = np.asarray(got.count <= (1 + 1e-5) * got.weight)
    np.testing.assert_array_equal(after.var, np.where(unseen | single, 1, got.var))
