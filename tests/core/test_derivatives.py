"""Derivatives of `batch_norm` in both modes and to second order, of complex input too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from bn_jax import batch_norm

RNG = np.random.default_rng(0)
X, DX, DDX = 2 * RNG.normal(size=(3, 8, 3)) + 1
SCALE, BIAS, DSCALE, DBIAS = RNG.normal(size=(4, 3))
MASKS = {
    "all": None,
    "bool": np.arange(8)[:, None] % 3 > 0,
    "weights": np.array([[1], [0], [0.3], [2], [0], [1], [1], [0.7]]),
}
AT, ALONG = (X, SCALE, BIAS, np.float64(0.1)), (DX, DSCALE, DBIAS, np.float64(0.05))
# pmap is shard_map(check_vma=False) since JAX 0.8, so one of them will do.
each_map = pytest.mark.parametrize("replicate", ["pmap", "vmap", "shard_map"], indirect=True)


def assert_close(got, want, tolerance=1e-8):
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, got, want)


def assert_close_to_largest(got, want, tolerance):
    """Of differences: their rounding is that of the largest number that comes in."""
    want = np.asarray(want)
    atol = tolerance * np.max(np.abs(want))
    np.testing.assert_allclose(np.asarray(got).astype(want.dtype), want, tolerance, atol)


def inner(a, b):
    return sum(jnp.vdot(v, w).real for v, w in zip(a, b, strict=True))


def outputs(x, scale, bias, epsilon, mask, activation=None, **options):
    y, seen = batch_norm(
        x, scale, bias, epsilon=epsilon, mask=mask, activation=activation, **options
    )
    return y, seen.mean, seen.var


def oracle(x, scale, bias, epsilon, mask):
    y, seen = reference.batch_norm(x, scale, bias, epsilon=epsilon, mask=mask)
    return y, seen.mean, seen.var


def directional(f, at, along, h=5e-3):
    """The derivative of a NumPy program by central differences of sixth order."""

    def moved(k):
        return f(*(a + k * h * d for a, d in zip(at, along, strict=True)))

    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    ends = [(w / h, moved(k), moved(-k)) for k, w in weights.items()]
    return tuple(
        sum(w * (ahead[i] - behind[i]) for w, ahead, behind in ends)
        for i in range(len(ends[0][1]))
    )


def assert_transposed(gradients, cotangents, tangents):
    """<vjp(c), t> is <c, jvp(t)>."""
    backwards, forwards = inner(gradients, ALONG), inner(cotangents, tangents)
    np.testing.assert_allclose(backwards, forwards, rtol=1e-10)


@each_map
def test_forward_mode_of_replicas(replicate, x64):
    mask = MASKS["weights"]

    def f(x, scale, bias, epsilon):
        def one(x, scale, bias, epsilon, mask):
            return outputs(x, scale, bias, epsilon, mask, axis_name="batch")

        copies = (jnp.stack([v] * 4) for v in (scale, bias, epsilon))
        y, mean, var = replicate(one)(x.reshape(4, 2, 3), *copies, mask.reshape(4, 2, 1))
        return y.reshape(8, 3), mean[0], var[3]

    @jax.jit
    def both_modes(cotangents):
        values, tangents = jax.jvp(f, AT, ALONG)
        return values, tangents, jax.vjp(f, *AT)[1](cotangents)

    want = directional(lambda *v: oracle(*v, mask), AT, ALONG)
    cotangents = tuple(np.cos(v) for v in want)
    values, tangents, gradients = both_modes(cotangents)
    assert_close(values, oracle(*AT, mask), 1e-12)
    assert_close(tangents, want)
    assert_transposed(gradients, cotangents, tangents)


@each_map
def test_gradient_of_a_map_that_is_jitted(replicate):
    x = X.astype(np.float32).reshape(4, 2, 3)
    f = replicate(lambda x: batch_norm(x, axis_name="batch")[0])

    def gradient(f):
        return jax.grad(lambda x: jnp.sum(f(x) ** 3))

    assert_close(gradient(jax.jit(f))(x), jax.jit(gradient(f))(x), 1e-5)


def naive(x, scale, bias, epsilon, mask, activation=None):
    w = jnp.ones((8, 1)) if mask is None else mask
    mean = jnp.sum(w * x, 0, keepdims=True) / jnp.sum(w)
    away = x - mean
    var = jnp.sum(w * (away.real**2 + away.imag**2), 0, keepdims=True) / jnp.sum(w)
    y = away / jnp.sqrt(var + epsilon) * scale[None] + bias[None]
    return y if activation is None else activation(y), mean[0], var[0]


def loss(f, *arguments):
    y, mean, var = f(*arguments)
    return jnp.sum(jnp.sin(y)) + jnp.sum(mean * var**2)


def hessian_product(f):
    return jax.jvp(jax.grad(f, range(4)), AT, ALONG)[1]


# Each is the Hessian times ALONG, or that times ALONG again.
COMPOSITIONS = {
    "forward over forward": lambda f: jax.jvp(lambda *at: jax.jvp(f, at, ALONG)[1], AT, ALONG)[
        1
    ],
    "forward over reverse": hessian_product,
    "reverse over forward": lambda f: jax.grad(lambda *at: jax.jvp(f, at, ALONG)[1], range(4))(
        *AT
    ),
    "reverse over reverse": lambda f: jax.grad(
        lambda *at: inner(jax.grad(f, range(4))(*at), ALONG), range(4)
    )(*AT),
}


@pytest.mark.parametrize(
    ("mask", "activation"), [("all", None), ("weights", None), ("weights", jax.nn.gelu)]
)
def test_second_derivatives(mask, activation, x64):
    given = {"mask": MASKS[mask], "activation": activation}
    ours, theirs = (
        functools.partial(loss, functools.partial(f, **given)) for f in (outputs, naive)
    )
    want = jax.jit(functools.partial(hessian_product, theirs))()
    every = jax.jit(lambda: {name: f(ours) for name, f in COMPOSITIONS.items()})()
    for name, got in every.items():
        assert_close(got, inner(want, ALONG) if name == "forward over forward" else want)


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        (jax.nn.relu, "float32"),
        (jax.nn.relu, "bfloat16"),
        (jax.nn.gelu, "bfloat16"),
        (jax.nn.gelu, "float64"),
        (jnp.tanh, "float32"),
    ],
)
def test_activation_is_composition(activation, dtype, x64):
    mask = MASKS["weights"]
    x, scale, bias = (jnp.asarray(v, dtype) for v in (X, SCALE, BIAS))
    arguments = x, scale, bias, jnp.asarray(0.1, jnp.promote_types(dtype, jnp.float32))
    ours, theirs = (
        functools.partial(f, mask=mask, activation=activation) for f in (outputs, naive)
    )
    got, vjp = jax.vjp(jax.jit(ours), *arguments)
    # In float64 from the same numbers: rounding of what comes back is all that differs.
    want, want_vjp = jax.vjp(theirs, *(v.astype(jnp.float64) for v in arguments))
    given = zip((DX, DSCALE, DBIAS), got, strict=True)
    cotangents = tuple(jnp.asarray(v, w.dtype) for v, w in given)
    gradients = vjp(cotangents)
    wanted = want_vjp(tuple(v.astype(jnp.float64) for v in cotangents))
    assert got[0].dtype == gradients[0].dtype == dtype
    rounding = 64 * float(jnp.finfo(arguments[-1].dtype).eps)
    for v, w in zip((*got, *gradients), (*want, *wanted), strict=True):
        assert_close_to_largest(v, w, max(rounding, float(jnp.finfo(v.dtype).eps)))


def complex_values(dtype):
    real = np.finfo(dtype).dtype
    x, scale, bias = X + 1j * DX, SCALE + 1j * DSCALE, BIAS - 1j * DBIAS
    return *(jnp.asarray(v, dtype) for v in (x, scale, bias)), jnp.asarray(0.1, real)


def real_loss(f, *arguments):
    y, mean, var = f(*arguments)
    of_moments = jnp.sum(mean.real**2 * var) + jnp.sum(mean.imag)
    return jnp.sum(jnp.abs(y - (1 + 2j)) ** 4) + of_moments, (y, mean, var)


@pytest.mark.parametrize(
    ("dtype", "mask", "real_parameters"),
    [
        (np.complex64, "weights", False),
        (np.complex128, "all", False),
        (np.complex128, "weights", True),
    ],
)
def test_complex(dtype, mask, real_parameters, x64):
    values, mask = complex_values(dtype), MASKS[mask]
    exact = jax.tree.map(lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float64)), values)
    if real_parameters:
        values, exact = ((v[0], v[1].real, v[2].real, v[3]) for v in (values, exact))

    def gradients_of(f):
        f = functools.partial(real_loss, functools.partial(f, mask=mask))
        return jax.jit(jax.grad(f, range(4), has_aux=True))

    gradients, (y, mean, var) = gradients_of(outputs)(*values)
    assert y.dtype == mean.dtype == dtype
    assert var.dtype == np.finfo(dtype).dtype
    assert [v.dtype for v in gradients] == [v.dtype for v in values]
    want, seen = gradients_of(naive)(*exact)
    tolerance = 1e-4 if dtype == np.complex64 else 1e-10
    for v, w in zip((*gradients, y, mean, var), (*want, *seen), strict=True):
        assert_close_to_largest(v, w, tolerance)


def test_complex_in_forward_mode(x64):
    at, mask = complex_values(np.complex128), MASKS["weights"]
    along = (at[0] * 1j + 1, at[2], at[1], 0.3)
    got, want = (
        jax.jvp(jax.jit(functools.partial(f, mask=mask)), at, along) for f in (outputs, naive)
    )
    assert_close(got, want, 1e-12)
