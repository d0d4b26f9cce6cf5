"""The gradient of batch normalisation in closed form.

With r = 1/sqrt(var + epsilon) and y_i = scale r (x_i - mean) + bias, of which mean and var
are the weighted moments of x (weights w_i, n = sum_i w_i):

    dbias  = sum_i dy_i
    dscale = sum_i dy_i r (x_i - mean)
    dvar   = -1/2 scale r^2 dscale
    dmean  = -scale r dbias
    dx_i   = scale r dy_i + w_i/n (dmean + 2 dvar (x_i - mean))

(Ioffe & Szegedy 2015, section 3; `sum_i w_i (x_i - mean)` is 0, so var does not depend on
mean.) Two passes over x and dy, the first for the sums and the second for dx; what is kept
from the forward pass is x, mean and r. Replicas that share statistics share dmean and dvar:
one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.core.moments import weigh


class Residuals(NamedTuple):
    """What the backward pass needs: x `[...]`, weights, scale, mean and r `[features]`, n."""

    x: jax.Array
    w: jax.Array | None
    scale: jax.Array | None
    mean: jax.Array
    r: jax.Array
    count: jax.Array


class Gradients(NamedTuple):
    """Cotangents of x, scale, bias and epsilon, in the dtype of the statistics."""

    x: jax.Array
    scale: jax.Array
    bias: jax.Array
    epsilon: jax.Array


def closed_form(
    residuals: Residuals,
    dy: jax.Array,
    *,
    reduced: tuple[int, ...],
    total: Callable[[jax.Array], jax.Array],
) -> Gradients:
    """The equations above, through the statistics of the batch.

    Args:
      residuals: from the forward pass.
      dy: cotangent of y, of x's shape.
      reduced: the axes of x that were averaged over.
      total: the sum over the replicas that share statistics.
    """
    x, w, scale, mean, r, count = residuals
    dtype = mean.dtype
    dy, x = dy.astype(dtype), x.astype(dtype)

    def wide(v):
        return jnp.expand_dims(v, reduced)

    if w is not None:
        # Padding may hold NaN, of which dy is 0: their product must not reach the sum.
        x = jnp.where((w > 0) | jnp.isfinite(x), x, 0)
    dbias = jnp.sum(dy, axis=reduced)
    dscale = r * jnp.sum(dy * (x - wide(mean)), axis=reduced)
    gain = r if scale is None else r * scale.astype(dtype)
    dvar = -0.5 * gain * r * dscale
    sums = total(jnp.stack([-gain * dbias, dvar]))
    to_mean, to_var = (v / jnp.where(count > 0, count, 1) for v in sums)
    # mean under another name, or XLA stores x - mean for here and reads it back.
    centred = x - wide(lax.optimization_barrier(mean))
    dx = wide(gain) * dy + weigh(wide(to_mean) + wide(2 * to_var) * centred, w)
    return Gradients(dx, dscale, dbias, jnp.sum(dvar))
