"""Products with few inputs are those of `lax.dot_general`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from bn_jax.lab.models.dense import FEW, product


def values_and_gradients(f, dtype, shape, width=5):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape, dtype)
    kernel = jax.random.normal(keys[1], (shape[-1], width), dtype)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    y, vjp = jax.vjp(lambda x, kernel: f(x, kernel, dims, precision=None), x, kernel)
    return y, *vjp(jax.random.normal(keys[2], y.shape, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(7, 1), (7, 2), (2, 3, FEW), (FEW,), (7, FEW + 1)])
def test_few_inputs(shape, dtype, x64):
    got, want = (values_and_gradients(f, dtype, shape) for f in (product, lax.dot_general))
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    for v, w in zip(got, want, strict=True):
        assert v.dtype == w.dtype
        np.testing.assert_allclose(v, w, tolerance, tolerance)


def test_half_precision_is_summed_by_lax():
    """In float32, that is."""
    got, want = (
        values_and_gradients(f, "bfloat16", (7, 2)) for f in (product, lax.dot_general)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("inputs", [2, FEW + 1])
def test_only_few_inputs_go_without_a_product(inputs):
    layer = nn.Dense(3, dot_general=product)
    text = str(jax.make_jaxpr(layer.init_with_output)(jax.random.key(0), jnp.ones((4, inputs))))
    assert ("dot_general" in text) == (inputs > FEW)
