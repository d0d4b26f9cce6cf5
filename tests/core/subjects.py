"""What the property tests try: functions of a `strategies.Layout`, compiled once for each."""

from __future__ import annotations

import functools

import jax
import numpy as np
import reference
import tolerances

from bn_jax.core.batch_norm import batch_norm
from bn_jax.core.moments import moments


@functools.cache
def compiled(f, layout, *static):
    """`f(layout, *static, ...)` from NumPy arrays to NumPy arrays."""
    jitted = jax.jit(functools.partial(f, layout, *static))

    def call(*arguments):
        with jax.enable_x64(layout.wide == np.float64):
            return jax.tree.map(np.asarray, jitted(*arguments))

    return call


def measure(layout, x, mask):
    return moments(x, axis=layout.axis, mask=mask)


def normalise(layout, mask, x, scale, bias, epsilon, **sharing):
    """What can be differentiated, (y, mean, var), and the count and weight."""
    y, (mean, var, *counts) = batch_norm(
        x, scale, bias, axis=layout.axis, epsilon=epsilon, mask=mask,
        activation=jax.nn.relu if layout.relu else None, **sharing,
    )  # fmt: skip
    return (y, mean, var), counts


def differentiate(layout, mask, arguments, cotangents):
    """y, mean, var, count, weight, and the cotangents of x, scale, bias and epsilon."""
    f = functools.partial(normalise, layout, mask)
    outputs, vjp, counts = jax.vjp(f, *arguments, has_aux=True)
    return *outputs, *counts, vjp(cotangents)


def both_modes(layout, mask, arguments, tangents, cotangents):
    """Tangents of (y, mean, var) and cotangents of the arguments."""
    f = functools.partial(normalise, layout, mask)
    _, vjp, _ = jax.vjp(f, *arguments, has_aux=True)
    return jax.jvp(f, arguments, tangents, has_aux=True)[1], vjp(cotangents)


def exact(v):
    """What `normalise` should return of `strategies.Values`, before relu: y and Moments."""
    return reference.batch_norm(v.clean, v.scale, v.bias, v.axis, v.epsilon, v.mask)


def exact_gradients(v, dy, dmean, dvar) -> reference.Gradients:
    return reference.gradients(v.clean, dy, dmean, dvar, v.scale, v.axis, v.epsilon, v.mask)


def cotangents_of(recipe, v, relu=False):
    """Of y, mean and var, in units of 1, r and r^2, or one would hide the others.

    0 in padding, of which y may be NaN, and where rounding picks the side of relu's kink.
    """
    rng = np.random.default_rng(recipe.seed + 1)
    y, seen = exact(v)
    r = 1 / np.sqrt(seen.var + v.epsilon)
    dy = rng.normal(size=v.x.shape)
    dy[v.padded | (relu & (np.abs(y) <= tolerances.of_y(v)))] = 0
    half = v.scale is None and v.bias is None
    dy = dy.astype(v.x.dtype if half else v.epsilon.dtype)
    return dy, *(rng.normal(size=(2, *r.shape)) * (r, r**2)).astype(v.epsilon.dtype)
