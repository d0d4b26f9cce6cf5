"""Convolutions and their derivatives are those of `lax.conv_general_dilated`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax.lab.models.convolution import Conv, convolution

CASES = {
    "same": ((2, 7, 6, 3), {}),
    "strides": ((2, 7, 6, 3), {"strides": 2}),
    "no padding": ((2, 7, 6, 3), {"padding": "VALID"}),
    "own padding": ((2, 7, 6, 3), {"padding": ((0, 2), (1, 0))}),
    "circular": ((2, 7, 6, 3), {"padding": "CIRCULAR"}),
    "input dilated": ((2, 7, 6, 3), {"input_dilation": 2, "padding": 1}),
    "kernel dilated": ((2, 7, 6, 3), {"kernel_dilation": 2}),
    "groups": ((2, 7, 6, 4), {"feature_group_count": 2}),
    "text": ((2, 9, 3), {"kernel_size": (3,)}),
    "film": ((2, 4, 5, 6, 3), {"kernel_size": (3, 2, 3)}),
    "two batch axes": ((2, 3, 7, 6, 3), {}),
    "one example": ((7, 6, 3), {}),
    "1x1": ((2, 7, 6, 3), {"kernel_size": (1, 1)}),
}


def layers(options):
    """Ours and Flax's."""
    fields = {"kernel_size": (3, 3), **options}
    return (make(features=4, use_bias=False, **fields) for make in (Conv, nn.Conv))


def normal(seed, shape, dtype):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def everything(layer, x, dtype):
    """Values, both gradients, the tangent, and the gradients of a gradient's norm."""
    kernel = normal(1, layer.init(jax.random.key(0), x)["params"]["kernel"].shape, dtype)

    def f(x, kernel):
        return layer.apply({"params": {"kernel": kernel}}, x)

    def norm(x, kernel):
        gradients = jax.grad(lambda *v: (f(*v) ** 3).sum(), (0, 1))(x, kernel)
        return sum((v**2).sum() for v in gradients)

    y, vjp = jax.vjp(f, x, kernel)
    tangents = normal(2, x.shape, dtype), normal(3, kernel.shape, dtype)
    return {
        "values": y,
        "gradients": vjp(normal(4, y.shape, dtype)),
        "tangent": jax.jvp(f, (x, kernel), tangents)[1],
        "of the input alone": jax.jvp(lambda x: f(x, kernel), (x,), tangents[:1])[1],
        "of the kernel alone": jax.jvp(lambda k: f(x, k), (kernel,), tangents[1:])[1],
        "second order": jax.grad(norm, (0, 1))(x, kernel),
    }


@pytest.mark.parametrize("case", CASES)
def test_as_flax(case, x64):
    shape, options = CASES[case]
    x = normal(0, shape, "float64")
    got, want = (everything(layer, x, "float64") for layer in layers(options))
    check = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    jax.tree.map(check, got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    x = normal(0, (2, 7, 6, 3), dtype)
    (got, want) = (everything(layer, x, dtype) for layer in layers({"dtype": dtype}))
    for name in ("values", "gradients"):
        for v, w in zip(*map(jax.tree.leaves, (got[name], want[name])), strict=True):
            assert v.dtype == w.dtype == dtype
            np.testing.assert_allclose(*(np.float32(a) for a in (v, w)), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_under_vmap(mapped, x64):
    x, kernel = normal(0, (4, 2, 5, 5, 3), "float64"), normal(1, (4, 3, 3, 3, 2), "float64")
    dimensions = ("NHWC", "HWIO", "NHWC")

    def gradients(conv, x, kernel):
        def f(x, kernel):
            y = conv(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
            return (y**3).sum()

        return jax.grad(f, (0, 1))(x, kernel)

    arguments = (v if axis == 0 else v[0] for v, axis in zip((x, kernel), mapped, strict=True))
    x, kernel = arguments
    got, want = (
        jax.vmap(functools.partial(gradients, conv), mapped)(x, kernel)
        for conv in (convolution, jax.lax.conv_general_dilated)
    )
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, 1e-12, 1e-12), got, want)


def test_channels_first(x64):
    dimensions = ("NCHW", "OIHW", "NCHW")
    x, kernel = normal(0, (2, 3, 5, 6), "float64"), normal(1, (4, 3, 3, 3), "float64")

    def gradients(conv):
        def f(x, kernel):
            return (conv(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions) ** 3).sum()

        return jax.grad(f, (0, 1))(x, kernel)

    got, want = map(gradients, (convolution, jax.lax.conv_general_dilated))
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, 1e-12, 1e-12), got, want)


def jaxpr_of_gradient(argument):
    x, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4))

    def f(x, kernel):
        y = convolution(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.sum()

    return str(jax.make_jaxpr(jax.grad(f, argument))(x, kernel))


def test_what_is_not_asked_for_is_not_computed():
    """One convolution forward, one for each gradient; axes are swapped for the kernel's."""
    for argument, convolutions, swaps in ((0, 2, False), (1, 2, True), ((0, 1), 3, True)):
        text = jaxpr_of_gradient(argument)
        assert text.count("conv_general_dilated[") == convolutions
        assert ("_swapped" in text) == swaps


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU backend")
def test_what_came_before_is_not_computed_again():
    """The kernel's gradient reads the input that the forward pass stored."""

    def f(kernel, x, conv):
        y = conv(nn.relu(x) * 3, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        return (y**2).sum()

    dimensions = ("NHWC", "HWIO", "NHWC")
    arguments = jnp.ones((3, 3, 8, 8)), jnp.ones((16, 8, 8, 8))
    found = {}
    for conv in (convolution, jax.lax.conv_general_dilated):
        gradient = jax.jit(functools.partial(jax.grad(f), conv=conv))
        text = gradient.lower(*arguments).compile().as_text()
        found[conv] = text.count(" maximum(")
    assert found == {convolution: 1, jax.lax.conv_general_dilated: 2}
