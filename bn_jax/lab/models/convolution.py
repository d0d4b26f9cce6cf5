"""A convolution whose kernel gradient reads what is in memory."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.xla_metadata import set_xla_metadata


def convolution(
    lhs: jax.Array, rhs: jax.Array, strides: Any, padding: Any, *,
    dimension_numbers: Any, **options: Any,
) -> jax.Array:  # fmt: skip
    """`lax.conv_general_dilated`, for `nn.Conv(conv_general_dilated=convolution)`.

    Arguments, result and errors are those; so are derivatives, forwards and backwards, of any
    order, and on other backends than CPU the program.

    XLA on CPU wants the input of a kernel gradient with examples and channels swapped, and
    computes what the input came from, BatchNorm and ReLU, once more in that order, number by
    number from all over memory: a seventh of a training step of CIFAR-10's network A
    (`benchmarks.tricks`). Here it swaps what the forward pass has stored.
    """

    def conv(lhs, rhs, numbers):
        return lax.conv_general_dilated(
            lhs, rhs, strides, padding, dimension_numbers=numbers, **options
        )

    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    if jax.default_backend() != "cpu":
        return conv(lhs, rhs, numbers)
    differentiable = jax.custom_jvp(functools.partial(conv, numbers=numbers))

    def jvp(primals, tangents):
        lhs, rhs = primals
        dlhs, drhs = tangents
        parts = []
        if not isinstance(dlhs, SymbolicZero):
            parts.append(conv(dlhs, rhs, numbers))
        if not isinstance(drhs, SymbolicZero):
            examples, features, *image = numbers.lhs_spec
            # A call that XLA may not inline is one that it cannot fuse anything with.
            with set_xla_metadata(inlineable="false"):
                swapped = _swapped(lhs, examples, features)
            spec = (features, examples, *image)
            parts.append(conv(swapped, drhs, numbers._replace(lhs_spec=spec)))
        return differentiable(lhs, rhs), sum(parts[1:], parts[0])

    differentiable.defjvp(jvp, symbolic_zeros=True)
    return differentiable(lhs, rhs)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _swapped(v, i, j):
    return v.swapaxes(i, j)


Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)
