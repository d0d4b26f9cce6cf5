"""The derivative of batch normalisation: one linear map, forwards and backwards.

With r = 1/sqrt(var + epsilon), h_i = r (x_i - mean) and y_i = scale h_i + bias, of which mean
and var are the weighted moments of x (weights w_i, n = sum_i w_i), tangents follow

    dmean = 1/n sum_i w_i dx_i
    dstd  = 1/n sum_i w_i h_i dx_i
    dy_i  = scale r (dx_i - dmean) + dbias + h_i (dscale - scale r (dstd + r/2 depsilon))

(Ioffe & Szegedy 2015, section 3; `sum_i w_i h_i` is 0, so var does not depend on mean.) JAX
transposes this map into the gradient in closed form: cotangents (here y', x', ...) are

    scale' = sum_i h_i y'_i    bias' = sum_i y'_i
    x'_i   = scale r (y'_i - w_i/n (bias' + h_i scale'))

so two passes over x and y', the first for the sums and the second for x', which is
A y' + B x + C. Kept for it are x, mean and var: everything else is computed again.
Replicas that share statistics need one all-reduce, in either direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.core.arrays import apart, counts, in_units, inverse_std, weigh


class Arguments(NamedTuple):
    """x `[...]`, weights, and scale, bias (None for 1, 0) and epsilon of x's rank."""

    x: jax.Array
    w: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None
    epsilon: jax.Array


def tangent(
    at: Arguments,
    mean: jax.Array,
    var: jax.Array,
    count: jax.Array,
    d: Arguments,
    *,
    reduced: tuple[int, ...],
    total: Callable[[tuple], tuple],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three terms of dy of the equations above, `[...]` each: by dx, by h, and the rest.

    Args:
      at: the arguments of the function.
      mean, var, count: the moments of the batch, of x's rank.
      d: the tangents of the arguments.
      reduced: the axes of x that were averaged over.
      total: the sums over the replicas that share statistics.
    """
    x, w, scale, bias, epsilon = at
    wide = mean.dtype
    dx = d.x.astype(wide)
    r = inverse_std(var, epsilon)
    gain = r if scale is None else r * scale

    n = jnp.where(count != 0, count, jnp.inf)
    if w is not None:
        w, of_w = in_units(w, reduced)
        # A sum of weights that overflowed has no derivative: divided by it all would be 0.
        n = jnp.where(count < jnp.inf, n / of_w, jnp.nan)

    def average(v):
        return jnp.sum(weigh(v, w), axis=reduced, keepdims=True) / n

    s = unit(var)
    if w is not None:
        # Padding may hold anything, and its dx is 0: a product that is NaN must not reach
        # the sums.
        x = jnp.where(counts(w) | jnp.isfinite(s * (x.astype(wide) - mean)), x, 0)
    again, x = apart(x, mean).astype(wide), x.astype(wide)
    # Not one x - mean for both: XLA would store it and read it back. Nor a factor beside it
    # in the second, which transposed is the sum of (x - mean) y' that XLA on CPU can fuse.
    scaled = s * (x - mean)
    along = jnp.real(jnp.conj(scaled) * dx) if jnp.iscomplexobj(x) else scaled * dx
    dmean, dstd = total((average(dx), average(along)))
    u = -gain * (r / s * dstd + 0.5 * r * d.epsilon)
    u = u if scale is None else u + d.scale
    v = -gain * dmean if bias is None else d.bias - gain * dmean
    hu = (again - lax.optimization_barrier(mean)) * (r * u)
    # Widened by an addition, which keeps x's sharding; a broadcast would not.
    return gain * dx, hu, v + jnp.zeros_like(hu)


def unit(var: jax.Array) -> jax.Array:
    """1/sqrt(var), or 1: about r, and shared by replicas where r need not be (an epsilon each).

    In this unit the products above stay within float32 up to a std of 1e18; in that of x
    they leave it at 1e13.
    """
    some = jnp.where(var > 0, var, 1)
    return lax.rsqrt(some)
