"""Batch normalisation as pure functions (Ioffe & Szegedy 2015)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from bn_jax.core import sync as _sync
from bn_jax.core.arrays import (
    Axes,
    accumulation_dtype,
    real_dtype,
    split_axes,
    weights,
    widen,
)
from bn_jax.core.backward import Arguments, tangents
from bn_jax.core.moments import Moments, moments


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
    sync: Callable[..., Moments] = _sync.sync,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    allow_single: bool = False,
) -> tuple[jax.Array, Moments]:
    """Normalises x by the statistics of the batch, and returns what it measured.

        y = scale (x - mean) / sqrt(var + epsilon) + bias,    Moments(mean, var, count)

    (Ioffe & Szegedy 2015, Algorithm 1.) Its derivative is the closed form of
    `bn_jax.core.backward`, to which the mask is a constant; forward mode, reverse mode and
    their compositions to any order work.

    Args:
      x: floating-point or complex array; the statistics are over every axis but `axis`.
      scale, bias: `[features]` (the kept axes in their order), or None for 1 and 0; or of
        x's rank and broadcastable to it, for values of each example's own.
      axis: the feature axis, or axes.
      epsilon: added to the variance; may be traced.
      mask: bool or non-negative weights of x's rank, broadcastable to it: what counts in
        the statistics. Masked elements are normalised all the same.
      axis_name, axis_index_groups, sync: replicas to share statistics with, as in
        `moments`.
      activation: applied to the result, element by element. Its derivative is taken from
        values that the backward pass computes again: nothing more than x is kept for it.
      allow_single: go on where there is one element per feature, whose y is the bias.

    Returns:
      y of x's shape, in the dtype that x, scale and bias promote to, and the Moments.

    Raises:
      TypeError, ValueError: as `moments`; scale or bias of another shape; or one element
        per feature.
    """
    x = jnp.asarray(x)
    if not allow_single:
        _refuse_single(x, axis, axis_name, axis_index_groups)
    wide = widen(x, axis, scale=scale, bias=bias)
    at = Arguments(x, weights(x, mask), *wide, jnp.asarray(epsilon, real_dtype(x)))
    at = _varying_alike(at)
    groups = _hashable(axis_index_groups)
    static = _Static(_hashable(axis), axis_name, groups, sync, activation)
    y, batch = _batch_norm(static, at)
    return y.astype(_result_type(x, scale, bias)), batch


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
    With `Moments` of x itself it is the normalisation of a batch by autodiff, open to
    study: `normalize(x, lax.stop_gradient(batch.mean), batch.var)` stops the gradient
    through the mean.

    Args:
      x: floating-point or complex array.
      mean, var, scale, bias: `[features]`, or of x's rank and broadcastable to it; scale
        and bias may be None.
      axis, epsilon: as in `batch_norm`.

    Returns:
      y of x's shape, in the dtype that x, scale and bias promote to.

    Raises:
      TypeError, ValueError: as `batch_norm`.
    """
    x = jnp.asarray(x)
    dtype = functools.reduce(
        jnp.promote_types, [jnp.result_type(v) for v in (mean, var)], accumulation_dtype(x)
    )
    wide = widen(x, axis, mean=mean, var=var, scale=scale, bias=bias)
    return _affine(x.astype(dtype), *wide, epsilon).astype(_result_type(x, scale, bias))


def _affine(x, mean, var, scale, bias, epsilon):
    factor = lax.rsqrt(var.astype(jnp.finfo(x.dtype).dtype) + epsilon)
    y = (x - mean) * (factor if scale is None else factor * scale)
    return y if bias is None else y + bias


class _Static(NamedTuple):
    axis: Axes
    axis_name: Hashable | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    sync: Callable
    activation: Callable | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_norm(static, at):
    batch = moments(
        at.x, axis=static.axis, mask=at.w, axis_name=static.axis_name,
        axis_index_groups=static.axis_index_groups, sync=static.sync,
    )  # fmt: skip
    y = _linear(static, at, batch)
    return y if static.activation is None else static.activation(y), batch


def _linear(static, at, batch):
    mean, var = widen(at.x, static.axis, mean=batch.mean, var=batch.var)
    x = at.x.astype(accumulation_dtype(at.x))
    return _affine(x, mean, var, at.scale, at.bias, at.epsilon)


@_batch_norm.defjvp
def _batch_norm_jvp(static, primals, tangents_in):
    (at,), (d,) = primals, tangents_in
    y, batch = _batch_norm(static, at)
    # What only the arguments and moments determine is computed again in the backward pass.
    derivative = jax.checkpoint(functools.partial(_derivative, static), prevent_cse=False)
    dy, dmean, dvar = derivative(at, batch, d)
    return (y, batch), (dy.astype(y.dtype), Moments(dmean, dvar, jnp.zeros_like(batch.count)))


def _derivative(static, at, batch, d):
    mean, var = widen(at.x, static.axis, mean=batch.mean, var=batch.var)
    count = batch.count
    if count.ndim:
        (count,) = widen(at.x, static.axis, count=count)
    reduced = split_axes(at.x, static.axis)[1]
    dy, dmean, dvar = tangents(
        at, mean, var, count, d, reduced=reduced,
        total=functools.partial(_total, static), vary=functools.partial(_vary_like, at.x),
    )  # fmt: skip
    if static.activation is not None:
        _, dy = jax.jvp(static.activation, (_linear(static, at, batch),), (dy,))
    return dy, dmean.reshape(batch.mean.shape), dvar.reshape(batch.var.shape)


def _total(static, tree):
    if static.axis_name is None:
        return tree
    return _sync.all_reduce(tree, static.axis_name, static.axis_index_groups)


def _varying_alike(tree):
    """Makes each array vary over all the mesh axes over which any of them does.

    Only under `shard_map(check_vma=True)`, where it tells JAX that a replicated value is
    from here on each device's own, so that its cotangent is summed over the devices.
    """
    names = frozenset().union(*map(_varying, jax.tree.leaves(tree)))
    return jax.tree.map(functools.partial(_vary, names), tree)


def _vary_like(x, tree):
    """Made to vary as one array: the transpose, an all-reduce, is one as well."""
    flat, unravel = ravel_pytree(tree)
    return unravel(_vary(_varying(x), flat))


def _vary(names, v):
    missing = tuple(names - _varying(v))
    return lax.pcast(v, missing, to="varying") if missing else v


def _varying(v):
    return jax.typeof(v).manual_axis_type.varying


def _refuse_single(x, axis, axis_name, groups):
    """As torch: the variance of one element is 0, its y is the bias whatever it is."""
    elements = math.prod(x.shape[a] for a in split_axes(x, axis)[1])
    if elements == 1 and axis_name is not None:
        elements = min(map(len, groups)) if groups else lax.axis_size(axis_name)
    if elements == 1:
        raise ValueError(
            f"one element per feature in an input of shape {x.shape} with feature axis "
            f"{axis}: it has no variance to normalise by (allow_single=True to go on)"
        )


def _result_type(*arrays):
    return jnp.result_type(*(v for v in arrays if v is not None))


def _hashable(v):
    return tuple(map(_hashable, v)) if isinstance(v, Iterable) else v
