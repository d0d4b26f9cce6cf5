"""Each domain against `batch_norm` of its examples alone, in float64 NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from bn_jax import BatchStats, domain_batch_norm, domain_normalize, ema
from bn_jax.core.sync import sync_once

D = 4
jitted = jax.jit(domain_batch_norm, static_argnums=2)
# Out of order, domains of unequal sizes, one of them (2) without examples.
DOMAIN = np.array([1, 0, 3, 0, 1, 0, 3, 0, 3, 0])


class Case(NamedTuple):
    shape: tuple[int, ...] = (10, 3)
    axis: int | tuple[int, ...] = -1
    mask: str | None = None
    own: bool = False  # scale and bias of each domain's own


CASES = {
    "plain": Case(),
    "images": Case((10, 2, 2, 3), own=True),
    "examples in the middle": Case((3, 10, 2, 2), axis=(0, -1), own=True),
    "mask": Case(mask="bool"),
    "weights": Case(mask="weights", own=True),
    "mask per feature": Case(mask="per feature"),
    "mask of positions": Case((10, 2, 2, 3), mask="positions"),
}


# pmap is shard_map(check_vma=False) since JAX 0.8, so one of them will do.
each_map = pytest.mark.parametrize("replicate", ["pmap", "vmap", "shard_map"], indirect=True)


def make_mask(case, rng):
    match case.mask:
        case "bool":
            return DOMAIN[:, None] != 3  # all of a domain
        case "weights":
            return rng.choice([0, 0.3, 1, 2], (10, 1))
        case "per feature":
            return rng.random((10, 3)) < 0.6
        case "positions":
            return np.array([1, 0, 1, 0.5]).reshape(1, 2, 2, 1)


def draw(case, dtype=np.float64):
    """x, scale and bias as given, the same of each domain, a mask, and cotangents."""
    rng = np.random.default_rng(0)
    features = reference.features(case.shape, case.axis)
    x, dy = 2 * rng.normal(size=(2, *case.shape)).astype(dtype) + 1
    dmean, dvar, *rows = rng.normal(size=(4, D, *features)).astype(dtype)
    if not case.own:
        rows = [np.repeat(v[:1], D, axis=0) for v in rows]
    given = rows if case.own else [v[0] for v in rows]
    return x, given, rows, make_mask(case, rng), (dy, dmean, dvar)


def assert_close(got, want, tolerance=1e-12):
    for v, w in zip(got, want, strict=True):
        v = np.asarray(v, np.float64)
        v = v.reshape(v.shape + (1,) * (w.ndim - v.ndim))  # a count that features share
        np.testing.assert_allclose(np.broadcast_to(v, w.shape), w, tolerance, tolerance)


def expected(x, rows, case, mask, cotangents, domain=DOMAIN):
    parts = reference.Parts(domain, D)
    y, seen = reference.batch_norm_of_parts(x, parts, *rows, case.axis, 0.1, mask)
    back = reference.gradients_of_parts(x, parts, *cotangents, rows[0], case.axis, 0.1, mask)
    vectors = back.scale, back.bias
    return (y, *seen), (back.x, *(v if case.own else v.sum(0) for v in vectors))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_domain_by_itself(case, x64):
    x, given, rows, mask, cotangents = draw(case)

    @jax.jit
    def f(x, scale, bias):
        y, seen = domain_batch_norm(
            x, DOMAIN, D, scale, bias, axis=case.axis, epsilon=0.1, mask=mask
        )
        return (y, seen.mean, seen.var), seen[2:]

    got, vjp, counts = jax.vjp(f, x, *given, has_aux=True)
    want, gradients = expected(x, rows, case, mask, cotangents)
    assert_close((*got, *counts), want)
    assert_close(vjp(cotangents), gradients)
    features = reference.features(case.shape, case.axis)
    assert counts[0].shape == (D, *(features if case.mask == "per feature" else ()))


@each_map
def test_devices_with_different_domains(replicate):
    case = Case((16, 3), own=True)
    x, given, rows, _, cotangents = draw(case, np.float32)
    # Domains that one device, two or all have; and examples that do not count.
    domain = np.array([0, 0, 0, 0, 0, 1, 0, 1, 3, 3, 1, 1, 0, 3, 1, 0])
    mask = np.arange(16)[:, None] % 7 > 0

    def f(x, domain, mask):
        def of(**options):
            return domain_batch_norm(x, domain, D, mask=mask, axis_name="batch", **options)

        y, seen = of(scale=given[0], bias=given[1], epsilon=0.1)
        return (y, *seen), of(sync=sync_once)[1]

    def loss(x):
        shards = (v.reshape(4, 4, *v.shape[1:]) for v in (x, domain, mask))
        (y, *seen), once = replicate(f)(*shards)
        y = y.reshape(16, 3)
        averages = (jnp.mean(v, 0) for v in seen[:2])
        return sum(map(jnp.vdot, cotangents, (y, *averages))), (y, seen, once)

    dx, (y, seen, once) = jax.jit(jax.grad(loss, has_aux=True))(x)
    want, gradients = expected(x, rows, case, mask, cotangents, domain)
    assert_close([dx], gradients[:1], 1e-4)
    for i in range(4):
        assert_close((y, *(v[i] for v in seen)), want, 1e-5)
        assert_close([v[i] for v in once], want[1:], 1e-5)


def test_running_statistics_of_each_domain():
    x, _, _, _, _ = draw(Case(), np.float32)
    stats = BatchStats.create((3,), domains=D)
    y, seen = jitted(x, DOMAIN, D)
    after = jax.vmap(ema)(stats, seen)
    np.testing.assert_array_equal(after.count, [1, 1, 0, 1])
    np.testing.assert_array_equal(after.mean[2], stats.mean[2])
    np.testing.assert_array_equal(after.var[2], stats.var[2])
    _, want = reference.batch_norm_of_parts(
        x, reference.Parts(DOMAIN, D), np.ones((D, 3)), np.zeros((D, 3))
    )
    mean = reference.ema(np.zeros((D, 3)), want.mean, 0.99, want.count)
    var = reference.ema(np.ones((D, 3)), want.var, 0.99, want.count > 1)
    assert_close((after.mean, after.var), (mean, var), 1e-6)
    # Inference is what training did, by the statistics of the batch.
    again = domain_normalize(x, jnp.asarray(DOMAIN), seen.mean, seen.var)
    assert_close([again], [np.asarray(y, np.float64)], 1e-6)


@pytest.mark.parametrize("outside", [-1, D, 10**6])
def test_domains_that_do_not_exist(outside):
    x, given, rows, _, cotangents = draw(Case(), np.float32)
    domain = np.where(np.arange(10) < 7, DOMAIN, outside)
    x[8] = np.nan
    dy, *of_seen = cotangents

    @jax.jit
    def f(x, scale, bias):
        y, seen = domain_batch_norm(x, domain, D, scale, bias, epsilon=0.1)
        return (y, seen.mean, seen.var), seen[2:]

    (y, *seen), vjp, counts = jax.vjp(f, x, *given, has_aux=True)
    few = Case((7, 3))
    rest = [x[:7], rows, few, None, (dy[:7], *of_seen), domain[:7]]
    (want_y, *want), gradients = expected(*rest)
    assert_close((*seen, *counts), want, 1e-5)
    assert_close([y[:7]], [want_y], 1e-5)
    assert np.all(np.isnan(y[7:]))
    dx, _, _ = vjp((dy, *of_seen))
    assert_close([dx[:7]], gradients[:1], 1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_a_domain_that_diverges_stays_alone(poison):
    case = Case(own=True)
    x, given, rows, _, (dy, dmean, dvar) = draw(case, np.float32)
    bad = DOMAIN == 3
    clean = np.where(bad[:, None], 0, x)
    of_clean = [
        np.where(bad[:, None], 0, dy),
        *(v * [[1], [1], [1], [0]] for v in (dmean, dvar)),
    ]
    want, gradients = expected(clean, rows, case, None, of_clean)

    @jax.jit
    def f(x):
        y, seen = domain_batch_norm(x, DOMAIN, D, *given, epsilon=0.1)
        return y, seen.mean, seen.var

    signs = np.where(np.arange(10) % 2, 1, -1)[:, None]
    (y, mean, var), vjp = jax.vjp(
        f, np.where(bad[:, None], poison * signs, x).astype(np.float32)
    )
    (dx,) = vjp((dy, dmean, dvar))
    assert_close((y[~bad], dx[~bad]), (want[0][~bad], gradients[0][~bad]), 1e-5)
    assert_close((mean[:3], var[:3]), (want[1][:3], want[2][:3]), 1e-5)


def test_a_mean_whose_square_overflows():
    # An empty domain's distance from it would be inf, and 0 of it NaN.
    x = np.float32(1e20 + 1e18 * np.random.default_rng(0).normal(size=(10, 3)))
    domain = np.where(np.arange(10) < 5, 0, 3)
    y, seen = jitted(x, domain, D)
    parts, ones = reference.Parts(domain, D), np.ones((D, 3))
    want, want_seen = reference.batch_norm_of_parts(x, parts, ones, 0 * ones)
    assert_close((seen.mean[1:3], seen.var[1:3]), (np.zeros((2, 3)),) * 2)
    np.testing.assert_allclose(seen.var[::3], want_seen.var[::3], 1e-4)
    assert_close([y], [want], 1e-3)


def test_memory_does_not_grow_with_the_domains():
    x = jnp.ones((1024, 64))
    domain = jnp.arange(1024) % 100

    def f(x):
        return domain_batch_norm(x, domain, 100)[0]

    kept = jax.tree.leaves(jax.vjp(jax.jit(f), x)[1])
    assert sum(v.nbytes for v in kept) < 16 * x.nbytes
    for program in (f, jax.grad(lambda x: jnp.sum(f(x) ** 3))):
        analysis = jax.jit(program).lower(x).compile().memory_analysis()
        assert analysis.temp_size_in_bytes < 8 * x.nbytes


@pytest.mark.parametrize(
    ("domain", "options", "message"),
    [
        ([0, 1], {}, r"domain of shape \(2,\)"),
        (np.zeros((6, 1), int), {}, r"domain of shape \(6, 1\)"),
        (np.zeros(6), {}, "float32"),
        (np.zeros(6, int), {"scale": np.ones((2, 3))}, r"scale of shape \(2, 3\) for 4"),
        (np.zeros(6, int), {"bias": np.ones((D, 1))}, r"bias of shape \(4, 1\)"),
        (np.zeros(6, int), {"scale": np.float32(1)}, r"scale of shape \(\)"),
        (np.zeros(6, int), {"bias": np.ones((0, 3))}, r"bias of shape \(0, 3\)"),
        (np.zeros(6, int), {"axis": (0, 1)}, r"axis=\(0, 1\)"),
        (np.zeros(6, int), {"mask": np.ones(6)}, r"mask of shape \(6,\)"),
    ],
)
def test_refused(domain, options, message):
    with pytest.raises(ValueError, match=message):
        domain_batch_norm(jnp.ones((6, 3)), domain, D, **options)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2)])
def test_statistics_that_do_not_fit_are_refused(shape):
    fits = jnp.ones((D, 3))
    for mean, var in [(jnp.ones(shape), fits), (fits, jnp.ones(shape))]:
        with pytest.raises(ValueError, match="of shape"):
            domain_normalize(jnp.ones((6, 3)), jnp.zeros(6, int), mean, var)
