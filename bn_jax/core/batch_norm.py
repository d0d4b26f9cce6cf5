"""Batch normalisation as pure functions (Ioffe & Szegedy 2015)."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.core.backward import Residuals, closed_form
from bn_jax.core.moments import (
    Axes,
    Moments,
    accumulation_dtype,
    moments,
    split_axes,
    weights,
)


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalises x by the statistics of the batch, and returns what it measured.

        y = scale (x - mean) / sqrt(var + epsilon) + bias,    Moments(mean, var, count)

    (Ioffe & Szegedy 2015, Algorithm 1.) Its reverse-mode gradient is the closed form of
    `bn_jax.core.backward`, to which the mask is a constant. Reverse mode of any order
    works, and forward over reverse (`jax.hessian`); `jax.jvp` of it alone does not.

    Args:
      x: floating-point array; the statistics are over every axis but `axis`.
      scale, bias: `[features]` (the kept axes in their order), or None for 1 and 0.
      axis: the feature axis, or axes.
      epsilon: added to the variance; may be traced.
      mask: bool or non-negative weights of x's rank, broadcastable to it: what counts in
        the statistics. Masked elements are normalised all the same.
      axis_name, axis_index_groups: replicas to share statistics with, as in `moments`.

    Returns:
      y of x's shape, in the dtype that x, scale and bias promote to, and the Moments.

    Raises:
      TypeError, ValueError: as `moments`; or scale or bias of another shape.
    """
    x = jnp.asarray(x)
    check_features(x, axis, scale=scale, bias=bias)
    static = _Static(_hashable(axis), axis_name, _hashable(axis_index_groups))
    w = weights(x, mask)
    epsilon = jnp.asarray(epsilon, accumulation_dtype(x))
    x, scale, bias, epsilon, w = _varying_alike((x, scale, bias, epsilon, w))
    batch = moments(
        x, axis=axis, mask=w, axis_name=axis_name, axis_index_groups=axis_index_groups
    )
    return _normalize(static, x, scale, bias, epsilon, w, batch), batch


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
) -> jax.Array:
    """scale (x - mean) / sqrt(var + epsilon) + bias, with statistics that are given.

    This is inference with running or population statistics (Ioffe & Szegedy 2015,
    Algorithm 2, line 11). It is computed in float32, or in float64 where x, mean or var is.

    Args:
      x: floating-point array.
      mean, var, scale, bias: `[features]`; scale and bias may be None.
      axis, epsilon: as in `batch_norm`.

    Returns:
      y of x's shape, in the dtype that x, scale and bias promote to.

    Raises:
      TypeError, ValueError: as `batch_norm`.
    """
    x = jnp.asarray(x)
    check_features(x, axis, mean=mean, var=var, scale=scale, bias=bias)
    _, reduced = split_axes(x, axis)
    dtype = functools.reduce(
        jnp.promote_types, [jnp.result_type(v) for v in (mean, var)], accumulation_dtype(x)
    )
    factor = lax.rsqrt(jnp.asarray(var, dtype) + epsilon)
    if scale is not None:
        factor = factor * scale
    y = (x.astype(dtype) - jnp.expand_dims(mean, reduced)) * jnp.expand_dims(factor, reduced)
    if bias is not None:
        y = y + jnp.expand_dims(bias, reduced)
    return y.astype(jnp.result_type(*(v for v in (x, scale, bias) if v is not None)))


class _Static(NamedTuple):
    axis: Axes
    axis_name: Hashable | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None


# The moments are an argument, of which the VJP returns no cotangent: what y owes to them is
# in that of x. Derivatives of the returned moments, and second ones, go through `moments`.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(static, x, scale, bias, epsilon, w, batch):
    return normalize(x, batch.mean, batch.var, scale, bias, axis=static.axis, epsilon=epsilon)


def _forward(static, x, scale, bias, epsilon, w, batch):
    y = normalize(x, batch.mean, batch.var, scale, bias, axis=static.axis, epsilon=epsilon)
    r = lax.rsqrt(batch.var + epsilon)
    return y, (Residuals(x, w, scale, batch.mean, r, batch.count), bias)


def _backward(static, kept, dy):
    residuals, bias = kept
    reduced = split_axes(residuals.x, static.axis)[1]
    grads = closed_form(residuals, dy, reduced=reduced, total=functools.partial(_total, static))
    dscale = None if residuals.scale is None else grads.scale.astype(residuals.scale.dtype)
    dbias = None if bias is None else grads.bias.astype(bias.dtype)
    return grads.x.astype(residuals.x.dtype), dscale, dbias, grads.epsilon, None, None


_normalize.defvjp(_forward, _backward)


def _total(static, v):
    if static.axis_name is None:
        return v
    return lax.psum(v, static.axis_name, axis_index_groups=static.axis_index_groups)


def _varying_alike(args):
    """Makes each argument vary over all the mesh axes over which any of them does.

    Under `shard_map(check_vma=True)` a replicated scale becomes a varying one here, outside
    the custom VJP, so that JAX sums its gradient over the devices as it does for every
    replicated parameter.
    """

    def axes(a):
        return jax.typeof(a).manual_axis_type.varying

    names = frozenset().union(*(axes(a) for a in args if a is not None))

    def vary(a):
        missing = tuple(names - axes(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(vary, args)


def check_features(x: jax.Array, axis: Axes, **vectors: jax.Array | None) -> None:
    """Raises a ValueError that names the first vector that is not of shape `[features]`."""
    kept, _ = split_axes(x, axis)
    features = tuple(x.shape[a] for a in kept)
    for name, v in vectors.items():
        if v is not None and jnp.shape(v) != features:
            raise ValueError(
                f"{name} of shape {jnp.shape(v)} for {features} features: an input of shape "
                f"{x.shape} with feature axis {axis}"
            )


def _hashable(v):
    return tuple(map(_hashable, v)) if isinstance(v, Iterable) else v
