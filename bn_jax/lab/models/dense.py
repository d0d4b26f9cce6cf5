"""The product of a dense layer, where a layer may have a handful of inputs."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

FEW = 4


def product(inputs: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """`lax.dot_general` of `nn.Dense(dot_general=product)`: inputs [..., i], kernel [i, o].

    Of `FEW` inputs or less it is a sum of their products with rows of the kernel. XLA on CPU
    has a call for each small product, and under `vmap` for each run's: of two inputs and 100
    runs the gradient of the kernel takes a quarter of a training step, and this a third less
    in all.
    """
    few = kernel.shape[0] <= FEW and jnp.finfo(kernel.dtype).bits >= 32
    if not few:
        return lax.dot_general(inputs, kernel, dimensions, **options)
    rows = jnp.expand_dims(kernel, tuple(range(1, inputs.ndim)))
    products = (inputs[..., i, None] * rows[i] for i in range(kernel.shape[0]))
    return functools.reduce(operator.add, products)
