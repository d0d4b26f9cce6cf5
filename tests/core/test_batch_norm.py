import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from bn_jax.core.batch_norm import batch_norm, normalize
from bn_jax.core.ghost import ghost_batch_norm
from bn_jax.core.moments import moments
from bn_jax.core.renorm import batch_renorm
from bn_jax.core.running import BatchStats


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    mask: str | None = None
    scale: bool = True
    bias: bool = True


CASES = {
    "plain": Case((6, 3)),
    "no scale": Case((6, 3), scale=False),
    "no bias": Case((6, 3), bias=False),
    "image, first axis": Case((3, 2, 2, 4), axis=0, scale=False, bias=False),
    "two axes": Case((2, 3, 4, 2), axis=(-1, 1)),
    "mask": Case((6, 3), mask="bool"),
    "weights": Case((6, 3), mask="weights"),
    "weights, middle axis": Case((4, 3, 2), axis=1, mask="weights", scale=False),
    "mask per feature": Case((6, 3), mask="per feature"),
    "mask over one of two axes": Case((4, 2, 3), axis=(1, 2), mask="one axis"),
    "nothing seen": Case((4, 3), mask="empty"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make_mask(kind, shape, axis, rng):
    kept = {a % len(shape) for a in np.atleast_1d(axis)}
    narrow = tuple(1 if a in kept else s for a, s in enumerate(shape))
    match kind:
        case "bool":
            mask = rng.random(narrow) < 0.6
        case "weights":
            mask = rng.choice([0, 0.3, 1, 2], narrow)
        case "per feature":
            mask = rng.random(shape) < 0.6
        case "one axis":
            mask = rng.random((*shape[:-1], 1)) < 0.6
        case "empty":
            return np.zeros(narrow, bool)
        case None:
            return None
    mask.flat[:2] = 1
    return mask


def draw(case, dtype=np.float64, seed=0):
    """x, scale, bias, mask and cotangents of y, mean and var."""
    rng = np.random.default_rng(seed)
    features = reference.features(case.shape, case.axis)
    x, dy = 2 * rng.normal(size=(2, *case.shape)).astype(dtype) + 1
    scale, bias, dmean, dvar = rng.normal(size=(4, *features)).astype(dtype)
    mask = make_mask(case.mask, case.shape, case.axis, rng)
    kept = scale if case.scale else None, bias if case.bias else None
    return x, *kept, mask, (dy, dmean, dvar)


def outputs(case, mask):
    def f(x, scale, bias, epsilon):
        y, seen = batch_norm(x, scale, bias, axis=case.axis, epsilon=epsilon, mask=mask)
        return y, seen.mean, seen.var

    return jax.jit(f)


def assert_forward_and_gradients(case, dtype, tolerance, epsilon=0.1):
    x, scale, bias, mask, cotangents = draw(case, dtype)
    got, vjp = jax.vjp(outputs(case, mask), x, scale, bias, np.asarray(epsilon, dtype))
    y, seen = reference.batch_norm(x, scale, bias, case.axis, epsilon, mask)
    for v, want in zip(got, (y, seen.mean, seen.var), strict=True):
        assert v.dtype == dtype
        np.testing.assert_allclose(v, want, tolerance, tolerance)
    want = reference.gradients(x, *cotangents, scale, case.axis, epsilon, mask)
    for v, want_v, argument in zip(vjp(cotangents), want, (x, scale, bias, 0), strict=True):
        if argument is not None:
            assert v.dtype == dtype
            np.testing.assert_allclose(v, want_v, tolerance, tolerance)


@each_case
def test_float64(case, x64):
    assert_forward_and_gradients(case, np.float64, 1e-12)


@pytest.mark.parametrize("name", ["image, first axis", "weights", "mask over one of two axes"])
def test_second_derivatives(name, x64):
    case = CASES[name]
    x, scale, bias, mask, _ = draw(case)
    given = {"x": x, "scale": scale, "bias": bias, "epsilon": 0.1}
    given = {name: v for name, v in given.items() if v is not None}

    def f(given):
        arguments = (given.get(name) for name in ("x", "scale", "bias", "epsilon"))
        return outputs(case, mask)(*arguments)

    check_grads(jax.jit(f), (given,), order=2, modes=["rev"], rtol=1e-5)


@pytest.mark.parametrize(
    ("x_dtype", "scale_dtype", "bias_dtype", "dtype"),
    [
        ("bfloat16", None, None, "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", None, "float32"),
        ("float16", None, "float16", "float16"),
        ("float16", "bfloat16", None, "float32"),
        ("float32", "bfloat16", "float16", "float32"),
    ],
)
def test_half_precision(x_dtype, scale_dtype, bias_dtype, dtype):
    x, scale, bias, _, _ = draw(Case((64, 3)))
    x = jnp.asarray(100 + x, x_dtype)
    scale = None if scale_dtype is None else jnp.asarray(scale, scale_dtype)
    bias = None if bias_dtype is None else jnp.asarray(bias, bias_dtype)
    (y, seen), vjp = jax.vjp(batch_norm, x, scale, bias)
    assert y.dtype == dtype
    assert seen.mean.dtype == seen.var.dtype == jnp.float32
    # Rounding of the result is all that half precision may cost.
    step = float(jnp.finfo(dtype).eps)
    exact = (None if v is None else np.asarray(v, np.float64) for v in (x, scale, bias))
    x64, scale64, bias64 = exact
    want, _ = reference.batch_norm(x64, scale64, bias64)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, step, 1e-4)
    got = vjp((jnp.cos(y), jax.tree.map(jnp.zeros_like, seen)))
    dy = np.asarray(jnp.cos(y), np.float64)
    want = reference.gradients(x64, dy, np.zeros(3), np.zeros(3), scale64)
    for v, argument, want_v in zip(got, (x, scale, bias), want, strict=False):
        if argument is not None:
            assert v.dtype == argument.dtype
            rtol = float(jnp.finfo(v.dtype).eps)
            np.testing.assert_allclose(np.asarray(v, np.float64), want_v, rtol, 1e-4)


STATS = BatchStats(jnp.full(3, 0.5), jnp.full(3, 2.0), jnp.float32(4))


@pytest.mark.parametrize(
    "function",
    [
        batch_norm,
        functools.partial(ghost_batch_norm, group_size=8),
        lambda x, *v, **k: batch_renorm(x, STATS, *v, **k),
        lambda x, *v, **k: (normalize(x, STATS.mean, STATS.var, *v, **k),),
    ],
)
@pytest.mark.parametrize(
    ("given", "dtype", "activation"),
    [
        ("bfloat16", "bfloat16", jax.nn.relu),
        ("float32", "float16", jnp.tanh),
        ("float16", "float32", None),
    ],
)
def test_dtype_of_the_result(function, activation, given, dtype):
    """As if the result were cast: the gradients too, of parameters in float32."""
    x, scale, bias, _, (dy, *_) = draw(Case((64, 3)), np.float32)
    x, dy = jnp.asarray(x, given), jnp.asarray(dy, dtype)

    def ours(x, scale, bias):
        return function(x, scale, bias, activation=activation, dtype=dtype)[0]

    def cast(x, scale, bias):
        x = x.astype(jnp.float32)
        return function(x, scale, bias, activation=activation)[0].astype(dtype)

    got, vjp = jax.vjp(jax.jit(ours), x, scale, bias)
    want, want_vjp = jax.vjp(jax.jit(cast), x, scale, bias)
    assert got.dtype == dtype
    for v, w in zip((got, *vjp(dy)), (want, *want_vjp(dy)), strict=True):
        assert v.dtype == w.dtype
        rtol = float(jnp.finfo(v.dtype).eps)
        v, w = (np.asarray(u, np.float64) for u in (v, w))
        np.testing.assert_allclose(v, w, rtol, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("along", ["a constant", "x"])
def test_half_precision_forward_mode(dtype, along):
    """Rounded once, also where large terms cancel: y does not follow x's unit or its zero."""
    x, scale, bias, _, (noise, *_) = draw(Case((64, 3)))
    x = jnp.asarray(x, dtype)
    dx = jnp.asarray(noise + (50 if along == "a constant" else 20 * x), dtype)
    f = functools.partial(batch_norm, dtype=dtype)
    _, got = jax.jvp(lambda x: f(x, *map(jnp.float32, (scale, bias)))[0], (x,), (dx,))
    x64, dx64 = (np.asarray(v, np.float64) for v in (x, dx))
    mean, var = x64.mean(0), x64.var(0)
    h = (x64 - mean) / np.sqrt(var + 1e-5)
    gain = scale / np.sqrt(var + 1e-5)
    want = gain * (dx64 - dx64.mean(0) - h * np.mean(h * dx64, 0))
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, step, 1e-4)


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [("float32", "complex64"), ("bfloat16", "float64"), ("float32", "float64")],
)
def test_parameters_of_a_wider_kind_than_x(x_dtype, dtype, x64):
    """Derivatives are in the dtype of y: not real, nor float32, on the way."""
    x, scale, bias, _, (dy, *_) = draw(Case((6, 3)))
    factor = 1 + 2j if dtype == "complex64" else 1e45  # beyond float32
    x, scale = jnp.asarray(x, x_dtype), jnp.asarray(scale, dtype)
    bias, dy = (jnp.asarray(factor * v, dtype) for v in (bias, dy))

    def plain(x, scale, bias):
        batch = moments(x)
        return normalize(x, batch.mean, batch.var, scale, bias)

    def ours(x, scale, bias):
        return batch_norm(x, scale, bias)[0]

    def derivatives(f):
        y, tangent = jax.jvp(f, (x, scale, bias), (x, scale, bias))
        return y, tangent, *jax.vjp(f, x, scale, bias)[1](dy)

    for got, want in zip(derivatives(ours), derivatives(plain), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, 1e-4, 1e-5)


@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_bfloat16_has_no_float32_copy(activation):
    """XLA on CPU makes one of what is summed twice under one name."""
    x = dy = jnp.ones((64, 16, 16, 32), jnp.bfloat16)

    def both(x, scale, bias, dy):
        f = functools.partial(batch_norm, activation=activation, dtype=jnp.bfloat16)
        y, vjp, seen = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, vjp(dy), seen

    program = jax.jit(both).lower(x, jnp.ones(32), jnp.zeros(32), dy).compile()
    masked = 0 if activation is None else x.nbytes
    assert program.memory_analysis().temp_size_in_bytes < masked + x.nbytes / 2


def test_mask_is_a_constant():
    x, scale, bias, mask, _ = draw(CASES["weights"], np.float32)

    def loss(mask):
        y, seen = batch_norm(x, scale, bias, mask=mask)
        return jnp.sum(y**3) + jnp.sum(seen.mean + seen.var + seen.count)

    assert not np.any(jax.grad(loss)(jnp.float32(mask)))


@pytest.mark.parametrize("padding", [np.nan, np.inf])
def test_gradients_ignore_padding(padding):
    x, scale, bias, mask, (dy, dmean, dvar) = draw(CASES["mask"], np.float32)
    dy, x = np.where(mask, dy, 0), np.where(mask, x, np.float32(padding))
    _, vjp = jax.vjp(outputs(CASES["mask"], mask), x, scale, bias, np.float32(0.1))
    clean = np.where(mask, x, 0)
    want = reference.gradients(clean, dy, dmean, dvar, scale, epsilon=0.1, mask=mask)
    for v, want_v in zip(vjp((dy, dmean, dvar)), want, strict=True):
        np.testing.assert_allclose(v, want_v, 1e-5, 1e-5)


COUNTS = [(4, 1, 2, 3), (4, 1, 2, 0)]


def replicas_data(counts):
    """Four replicas of 4 examples, of which `counts` are valid; replica means differ."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 4, 3)) + np.reshape([-3, 4, 0, 9], (4, 1, 1))
    mask = np.arange(4)[None, :, None] < np.reshape(counts, (4, 1, 1))
    return x.astype(np.float32), np.float32([1, 2, -1]), np.float32([0, 1, 2]), mask


def loss_of_moments(mean, var):
    return jnp.sum(mean**2) + jnp.sum(jnp.sin(var))


def single_device_loss(x, scale, bias, epsilon, mask):
    mask = mask.reshape(-1, 1)
    y, seen = batch_norm(x.reshape(-1, 3), scale, bias, epsilon=epsilon, mask=mask)
    return jnp.sum(mask * jnp.sin(y)) + loss_of_moments(seen.mean, seen.var)


single_device = jax.jit(jax.value_and_grad(single_device_loss, range(4)))


def assert_same(got, want):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize(
    ("mapped", "groups"), [(jax.vmap, None), (jax.pmap, None), (jax.pmap, [[0, 3], [1, 2]])]
)
def test_gradients_taken_on_the_device(mapped, groups):
    x, scale, bias, mask = replicas_data(COUNTS[1])
    arguments = scale, bias, np.float32(0.1)

    def on_device(x, mask):
        def loss(x, scale, bias, epsilon):
            y, seen = batch_norm(
                x, scale, bias, epsilon=epsilon, mask=mask,
                axis_name="batch", axis_index_groups=groups,
            )  # fmt: skip
            # Each replica's part: what is differentiated is the sum over the replicas.
            of_moments = loss_of_moments(seen.mean, seen.var) / (2 if groups else 4)
            return jnp.sum(mask * jnp.sin(y)) + of_moments

        value, (dx, *shared) = jax.value_and_grad(loss, range(4))(x, *arguments)
        return dx, jax.lax.psum((value, shared), "batch")

    dx, shared = jax.jit(mapped(on_device, axis_name="batch"))(x, mask)
    wanted, wanted_dx = [], np.zeros_like(x)
    for group in groups or [[0, 1, 2, 3]]:
        value, (wanted_dx[group], *rest) = single_device(x[group], *arguments, mask[group])
        wanted.append((value, rest))
    assert_same(dx, wanted_dx)
    assert_same(
        jax.tree.map(lambda v: v[0], shared), jax.tree.map(lambda *parts: sum(parts), *wanted)
    )


@pytest.mark.parametrize("inside", [True, False])
def test_shard_map_with_replicated_parameters(make_mesh, inside):
    def loss(x, scale, bias, epsilon, mask):
        y, seen = batch_norm(
            x[0], scale, bias, epsilon=epsilon, mask=mask[0], axis_name="batch"
        )
        of_y = jax.lax.psum(jnp.sum(mask[0] * jnp.sin(y)), "batch")
        return of_y + loss_of_moments(seen.mean, seen.var)

    shard = functools.partial(
        jax.shard_map,
        mesh=make_mesh(batch=4),
        in_specs=(P("batch"), P(), P(), P(), P("batch")),
    )
    if inside:
        f = jax.value_and_grad(loss, range(4))
        f = shard(f, out_specs=(P(), (P("batch"), P(), P(), P())))
    else:
        f = jax.value_and_grad(shard(loss, out_specs=P()), range(4))
    f = jax.jit(f)
    for counts in COUNTS:
        x, scale, bias, mask = replicas_data(counts)
        arguments = x, scale, bias, np.float32(0.1), mask
        assert_same(f(*arguments), single_device(*arguments))


def test_shard_map_with_replicated_input_and_sharded_mask(make_mesh):
    x, _, _, mask = replicas_data(COUNTS[0])

    def loss(x, mask):
        y, seen = batch_norm(x, mask=mask[0], axis_name="batch")
        of_y = jax.lax.psum(jnp.sum(mask[0] * jnp.sin(y)), "batch")
        return of_y + loss_of_moments(seen.mean, seen.var)

    sharded = jax.shard_map(
        loss, mesh=make_mesh(batch=4), in_specs=(P(), P("batch")), out_specs=P()
    )

    def single(x):
        return single_device_loss(jnp.tile(x, (4, 1)), np.ones(3), np.zeros(3), 1e-5, mask)

    got = jax.jit(jax.value_and_grad(sharded))(x[0], mask)
    assert_same(got, jax.value_and_grad(single)(x[0]))


def test_jit_with_sharding_is_global(make_mesh):
    x, scale, bias, mask = replicas_data(COUNTS[1])
    sharding = NamedSharding(make_mesh(batch=4), P("batch"))
    placed = jax.device_put(x, sharding), scale, bias, 0.1, jax.device_put(mask, sharding)
    got = single_device(*placed)
    assert_same(got, single_device(x, scale, bias, 0.1, mask))


@pytest.mark.parametrize(("shape", "axis"), [((4, 3), -1), ((3, 2, 4), 0), ((2, 3, 4), (0, 2))])
def test_normalize(shape, axis):
    x, scale, bias, _, (_, mean, var) = draw(Case(shape, axis), np.float32)
    for s, b in [(scale, bias), (None, bias), (scale, None), (None, None)]:
        got = normalize(x, mean, var**2, s, b, axis=axis, epsilon=1e-3)
        want = reference.normalize(x, mean, var**2, s, b, axis, 1e-3)
        np.testing.assert_allclose(got, want, 1e-5, 1e-5)


def test_normalize_is_in_the_widest_dtype(x64):
    # A variance of 1e-50 is 0 in float32, and y would be -inf.
    mean, var = jnp.float64([1e-25]), jnp.float64([1e-50])
    y = normalize(jnp.zeros((1, 1), jnp.bfloat16), mean, var, epsilon=0)
    assert (y, y.dtype) == (-1, jnp.bfloat16)


@pytest.mark.parametrize("name", ["scale", "bias", "mean", "var"])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (4, 1), (1, 1, 3)])
def test_vectors_that_do_not_fit_are_refused(name, shape):
    x, given = jnp.ones((4, 3)), {name: jnp.ones(shape)}
    with pytest.raises(ValueError, match=name):
        normalize(x, **{"mean": jnp.zeros(3), "var": jnp.ones(3)} | given)
    if name in ("scale", "bias"):
        with pytest.raises(ValueError, match=name):
            batch_norm(x, **given)


def test_inputs_that_do_not_fit_are_refused():
    for f in (batch_norm, lambda x, **given: normalize(x, jnp.zeros(3), jnp.ones(3), **given)):
        with pytest.raises(TypeError, match="int32"):
            f(jnp.ones((4, 3), jnp.int32))
        with pytest.raises(ValueError, match="not exist"):
            f(jnp.ones((4, 3)), axis=2)
    with pytest.raises(ValueError, match="no elements"):
        batch_norm(jnp.ones((0, 3)))
    with pytest.raises(ValueError, match="mask"):
        batch_norm(jnp.ones((3, 3)), mask=jnp.ones(3))
    with pytest.raises(TypeError, match="dtype=int32: y is of floating-point"):
        batch_norm(jnp.ones((4, 3)), dtype=int)
