"""The gradient of batch normalisation in closed form.

With r = 1/sqrt(var + epsilon), y_i = scale r (x_i - mean) + bias, and a loss that depends
on y and, where somebody uses them, on mean and var as well:

    dbias  = sum_i dy_i
    dscale = sum_i dy_i r (x_i - mean)
    Dvar   = -1/2 scale r^2 dscale + dvar           d loss / d var
    Dmean  = -scale r dbias + dmean                 d loss / d mean
    dx_i   = scale r dy_i + w_i/n (Dmean + 2 Dvar (x_i - mean))

(Ioffe & Szegedy 2015, section 3, with weights w_i and n = sum_i w_i; `sum_i w_i (x_i -
mean)` is 0, so var does not depend on mean.) Two passes over x and dy, the first for the
sums and the second for dx; what is kept from the forward pass is x, mean and r.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    """Cotangents of x, scale, bias (in the accumulation dtype) and epsilon."""

    x: jax.Array
    scale: jax.Array
    bias: jax.Array
    epsilon: jax.Array


def closed_form(
    residuals: Residuals,
    dy: jax.Array,
    dmean: jax.Array,
    dvar: jax.Array,
    *,
    reduced: tuple[int, ...],
    total: Callable[[jax.Array, jax.Array], jax.Array],
) -> Gradients:
    """The equations above.

    Args:
      residuals: from the forward pass.
      dy: cotangent of y, of x's shape.
      dmean, dvar: cotangents of the returned mean and variance, `[features]`.
      reduced: the axes of x that were averaged over.
      total: `(own, given)` to the sum over synchronised replicas of [Dmean, Dvar]: `own`
        is the part that comes from this replica's y, `given` is [dmean, dvar].
    """
    x, w, scale, mean, r, count = residuals

    def wide(v):
        return jnp.expand_dims(v, reduced)

    dy = dy.astype(mean.dtype)
    centred = x.astype(mean.dtype) - wide(mean)
    dbias = jnp.sum(dy, axis=reduced)
    dscale = r * jnp.sum(dy * centred, axis=reduced)
    gain = r if scale is None else r * scale.astype(mean.dtype)
    dvar_y = -0.5 * gain * r * dscale
    sums = total(jnp.stack([-gain * dbias, dvar_y]), jnp.stack([dmean, dvar]))
    to_mean, to_var = sums / jnp.where(count > 0, count, 1)
    dx = wide(gain) * dy + weigh(wide(to_mean) + wide(2 * to_var) * centred, w)
    return Gradients(dx, dscale, dbias, jnp.sum(dvar_y))
