import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax import batch_norm, ghost_batch_norm
from bn_jax.core.moments import Moments, moments
from bn_jax.core.sync import sync

moments_module = sys.modules["bn_jax.core.moments"]


def normal(shape, seed=0, mean=0.0, dtype=np.float32):
    return (np.random.default_rng(seed).normal(size=shape) + mean).astype(dtype)


def assert_moments(got, want, rtol=1e-5, atol=1e-6):
    for name in Moments._fields:
        values, wanted = np.asarray(getattr(got, name), np.float64), getattr(want, name)
        values = np.broadcast_to(values, wanted.shape)
        np.testing.assert_allclose(values, wanted, rtol, atol, err_msg=name)


@pytest.fixture(params=["about a shift", "raw if they do"])
def sums(request, monkeypatch):
    """Both ways to sum, whatever the size and the number of devices."""
    raw = request.param == "raw if they do"
    monkeypatch.setattr("bn_jax.core.moments._raw_sums_first", lambda x: ("cpu",) * raw)


@pytest.mark.usefixtures("sums")
def test_nothing_seen_is_zero_and_finite():
    x = jnp.full((4, 2), jnp.nan)
    for got in (moments(x, mask=jnp.zeros((4, 1))), moments(x, mask=jnp.zeros((4, 2), bool))):
        assert all(np.all(np.asarray(v) == 0) for v in got)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(
    "order", ["drawn", "permuted", "sorted", "outlier first", "outliers at a stride", "padded"]
)
def test_mean_of_10000_std(order):
    x = normal((262_144, 1), mean=1e4)
    mask = None
    if order == "permuted":
        x = np.random.default_rng(1).permutation(x)
    elif order == "sorted":
        x = np.sort(x, axis=0)
    elif order == "outlier first":
        x[0] = -2e4
    elif order == "outliers at a stride":
        # A shift by a sample that is all outliers.
        x[::256] += 1000
    elif order == "padded":
        x[0], mask = -1e30, np.arange(len(x))[:, None] > 0
    got, want = moments(x, mask=mask), reference.moments(x, mask=mask)
    np.testing.assert_allclose(got.var, want.var, rtol=1e-4)
    np.testing.assert_allclose(got.mean, want.mean, rtol=2e-7)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("x", [0.0, -0.0, 1e-30, 7.0, 3e18, 1e20, np.inf, np.nan])
def test_one_value(x):
    """What is not finite is not made so, and a sum of squares that overflows is no NaN."""
    got = moments(np.full((64, 2), x, np.float32))
    if np.isfinite(x):
        np.testing.assert_allclose(got.mean, x, rtol=1e-6)
        assert np.all((got.var >= 0) & (got.var <= (1e-7 * x) ** 2))
    else:
        assert not np.any(np.isfinite(got.mean))
        assert not np.any(np.isfinite(got.var))


def test_raw_sums_are_of_large_arrays_that_one_cpu_has_and_on_tpus(make_mesh):
    shared, found = NamedSharding(make_mesh(batch=4), P("batch")), []
    for shape, dtype in (((1 << 16) - 4, "f4"), (1 << 16, "f4"), ((1 << 25) + 4, "bfloat16")):
        for sharding in (None, shared):
            x = jax.ShapeDtypeStruct((shape,), dtype, sharding=sharding)
            jax.jit(lambda x: found.append(moments_module._raw_sums_first(x))).trace(x)
    assert found == [(), (), ("cpu",), (), ("cpu", "tpu"), ("tpu",)]


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("mean", [0, 30])
def test_derivatives_of_moments(mean):
    x, dx = normal((16, 3), mean=mean), normal((16, 3), seed=1)
    (_, v), (dm, dv) = jax.jvp(lambda x: moments(x)[:2], (x,), (dx,))
    wide, tangent = x.astype(np.float64), dx.astype(np.float64)
    np.testing.assert_allclose(dm, tangent.mean(0), rtol=1e-5, atol=1e-6)
    want = 2 * ((wide - wide.mean(0)) * tangent).mean(0)
    np.testing.assert_allclose(dv, want, rtol=1e-4, atol=1e-5)
    grad = jax.grad(lambda x: (moments(x).var * v).sum())(x)
    want = 2 * (wide - wide.mean(0)) * np.asarray(v) / 16
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("sums")
def test_vmap_and_layers_of_far_and_near_features():
    x = normal((3, 40, 2)) + np.array([0.0, 1e3, 5.0], np.float32)[:, None, None]
    got = jax.jit(jax.vmap(moments))(x)
    for i in range(3):
        want = reference.moments(x[i])
        np.testing.assert_allclose(got.var[i], want.var, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    # In float16 the squares of 300 pass the largest number, 65504.
    x = jnp.asarray(300 * normal((1000, 2), mean=1), dtype)
    got = moments(x)
    assert {v.dtype for v in got} == {jnp.dtype("float32")}
    assert_moments(got, reference.moments(x.astype(jnp.float32)), rtol=2e-6)


@pytest.mark.usefixtures("sums")
def test_gradient_ignores_nan_under_the_mask():
    x, mask = normal((5, 2)), np.array([[1], [1], [0], [1], [0]])

    def loss(x):
        got = moments(x, mask=mask)
        return jnp.sum(got.mean + got.var)

    ones, zeros = np.ones(2), np.zeros((5, 2))
    want = reference.gradients(x, zeros, ones, ones, mask=mask).x
    np.testing.assert_allclose(
        jax.grad(loss)(jnp.where(mask, x, jnp.nan)), want, rtol=1e-5, atol=1e-6
    )


def test_groups_of_replicas():
    x = normal((4, 4, 3))
    mask = np.arange(4)[None, :, None] < np.reshape([4, 1, 2, 0], (4, 1, 1))
    groups = [[0, 3], [1, 2]]

    def f(x, m):
        return moments(x, mask=m, axis_name="batch", axis_index_groups=groups)

    got = jax.pmap(f, axis_name="batch")(x, mask)
    for i, want in enumerate(reference.replicas(x, mask=mask, groups=groups)):
        assert_moments(Moments(*(v[i] for v in got)), want)


@pytest.mark.parametrize("spec", [P(("data", "model")), P()], ids=str)
def test_synchronised_moments_are_replicated_for_shard_map(make_mesh, spec):
    # out_specs=P() is refused of anything that JAX cannot prove equal on all devices.
    x = normal((8, 3))
    f = jax.shard_map(
        lambda x: sync(moments(x), ("data", "model")),
        mesh=make_mesh(data=2, model=2), in_specs=spec, out_specs=P(),
    )  # fmt: skip
    got = jax.jit(f)(x)
    want = reference.moments(x)
    copies = 4 if spec == P() else 1
    assert_moments(got, want._replace(count=want.count * copies))


@pytest.mark.parametrize("dtype", ["int32", "bool", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_integers_and_floats_of_8_bits_are_refused(dtype):
    x = jnp.ones((4, 2), dtype)
    for function in (moments, batch_norm, functools.partial(ghost_batch_norm, group_size=2)):
        with pytest.raises(TypeError, match=f"normalisation of {dtype} input: cast"):
            function(x, allow_single=True) if function is batch_norm else function(x)


@pytest.mark.parametrize("mask_shape", [None, (0, 3), (1, 1)])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_no_elements_are_refused(shape, mask_shape):
    mask = None if mask_shape is None else jnp.ones((1,) * (len(shape) - 2) + mask_shape)
    with pytest.raises(ValueError, match="no elements"):
        moments(jnp.ones(shape), mask=mask)


@pytest.mark.parametrize("mask_shape", [(), (3,), (4,), (4, 4), (2, 3), (1, 4, 3), (4, 3, 1)])
def test_masks_that_do_not_fit_are_refused(mask_shape):
    with pytest.raises(ValueError, match="mask"):
        moments(jnp.ones((4, 3)), mask=jnp.ones(mask_shape))


@pytest.mark.parametrize(
    ("axis", "message"),
    [(2, "not exist"), (-3, "not exist"), ((0, 5), "not exist"), ((1, -1), "twice")],
)
def test_axes_that_do_not_fit_are_refused(axis, message):
    with pytest.raises(ValueError, match=message):
        moments(jnp.ones((4, 3)), axis=axis)
