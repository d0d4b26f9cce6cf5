"""Batch normalisation as pure functions (Ioffe & Szegedy 2015)."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike

from bn_jax.core import sync as _sync
from bn_jax.core.arrays import (
    Axes,
    accumulation_dtype,
    as_axes,
    counts,
    inverse_std,
    is_stored_wide,
    promoting,
    real_dtype,
    split_axes,
    vary,
    varying,
    weights,
    widen,
    widen_epsilon,
)
from bn_jax.core.backward import Arguments, tangent, unit
from bn_jax.core.eager import one_program
from bn_jax.core.moments import Moments, moments
from bn_jax.core.numbers import check_epsilon
from bn_jax.core.rounded import rounded_sum

# Of these the derivative is 0 or 1, so that a cotangent in half precision remains one.
EXACT = (None, jax.nn.relu, jax.nn.relu6)


@promoting
def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: jax.Array | float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    sync: Callable[..., Moments] = _sync.sync,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
    allow_single: bool = False,
) -> tuple[jax.Array, Moments]:
    """Normalises x by the statistics of the batch, and returns what it measured.

        y = scale (x - mean) / sqrt(var + epsilon) + bias,    Moments(mean, var, count, weight)

    (Ioffe & Szegedy 2015, Algorithm 1.) Its derivative is the closed form of
    `bn_jax.core.backward`, to which the mask is a constant; forward mode, reverse mode and
    their compositions to any order work. (Over an axis of `vmap` it is autodiff's.)

    Args:
      x: floating-point or complex array; the statistics are over every axis but `axis`.
      scale, bias: `[features]` (the kept axes in their order), or None for 1 and 0; or of
        x's rank and broadcastable to it, for values of each example's own.
      axis: the feature axis, or axes.
      epsilon: added to the variance; may be traced; or an array like scale.
      mask: bool or non-negative weights of x's rank, broadcastable to it: what counts in
        the statistics. Masked elements are normalised all the same.
      axis_name, axis_index_groups, sync: replicas to share statistics with, as in
        `moments`.
      activation: applied to the result, whose shape it keeps. Its derivative is taken from
        values that the backward pass computes again: nothing more than x is kept for it.
        A function of its argument alone: it cannot close over what is differentiated.
      dtype: of y; by default what x, scale and bias promote to.
      allow_single: go on where there is one element per feature, whose y is the bias.

    Returns:
      y of x's shape, and the Moments.

    Raises:
      TypeError, ValueError: as `moments`; scale, bias or epsilon of another shape; an epsilon
        that is not finite or below 0; an activation that changes the shape; a dtype of
        integers; or one element per feature.
    """
    x, axis = jnp.asarray(x), as_axes(axis)
    accumulation_dtype(x)  # refuses integers and the like
    if not allow_single:
        refuse_single(x.shape, axis, axis_name, axis_index_groups)
    check_epsilon(epsilon)
    dtype = result_type(dtype, x, scale, bias)
    settings = Settings.of(axis, axis_name, axis_index_groups, activation, dtype, sync)
    return _batch_norm(settings, x, scale, bias, epsilon, mask)


class Settings(NamedTuple):
    """What says how a batch is normalised, beside arrays; as in `batch_norm`."""

    axis: Axes
    axis_name: Hashable | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    activation: Callable[[jax.Array], jax.Array] | None
    dtype: jnp.dtype
    sync: Callable[..., Moments] = _sync.sync

    @classmethod
    def of(cls, axis: Axes, axis_name: Hashable | None, groups: Any, *others: Any) -> Settings:
        """Settings of which axes and groups may be lists; the others follow in their order."""
        return cls(_hashable(axis), axis_name, _hashable(groups), *others)

    def moments(self, x: jax.Array, mask: jax.Array | None) -> Moments:
        """`moments` of x."""
        axis, axis_name, groups, *_, sync = self
        return moments(
            x, axis=axis, mask=mask, axis_name=axis_name, axis_index_groups=groups, sync=sync
        )


@one_program
def _batch_norm(settings, x, scale, bias, epsilon, mask):
    if not _has_rule(settings.axis_name):
        x = x.astype(accumulation_dtype(x))  # once: autodiff's parts of dx are rounded once
    batch = settings.moments(x, mask)
    return normalized(settings, x, batch, scale, bias, epsilon, mask), batch


@promoting
def normalize_batch(
    x: jax.Array,
    batch: Moments,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: jax.Array | float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """`normalize` by the moments of x itself, with the derivative in closed form.

    What y owes to x through `batch` is in that derivative; of `batch` as an argument y has
    none (over an axis of `vmap`: autodiff's, by way of `batch`). Arguments and result are
    those of `batch_norm`, whose second half this is.
    """
    x, axis = jnp.asarray(x), as_axes(axis)
    check_epsilon(epsilon)
    dtype = result_type(dtype, x, scale, bias)
    settings = Settings.of(axis, axis_name, axis_index_groups, activation, dtype)
    return normalized(settings, x, batch, scale, bias, epsilon, mask)


def normalized(settings: Settings, x, batch, scale, bias, epsilon, mask) -> jax.Array:
    """`normalize_batch` of arguments that were checked."""
    scale, bias = widen(x, settings.axis, scale=scale, bias=bias)
    epsilon = jnp.asarray(widen_epsilon(x, settings.axis, epsilon), real_dtype(x))
    at, static = (
        Arguments(x, weights(x, mask), scale, bias, epsilon),
        settings._replace(sync=_sync.sync),
    )
    if _has_rule(settings.axis_name):
        return _normalize(static, _varying_alike(at), batch)
    return _by_autodiff(static, at, batch).astype(settings.dtype)


@promoting
def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: jax.Array | float = 1e-5,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
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
      axis, epsilon, activation, dtype: as in `batch_norm`.

    Returns:
      y of x's shape.

    Raises:
      TypeError, ValueError: as `batch_norm`.
    """
    x, axis = jnp.asarray(x), as_axes(axis)
    check_epsilon(epsilon)
    computed = functools.reduce(
        jnp.promote_types, [jnp.result_type(v) for v in (mean, var)], accumulation_dtype(x)
    )
    dtype = result_type(dtype, x, scale, bias)
    mean, var, scale, bias = widen(x, axis, mean=mean, var=var, scale=scale, bias=bias)
    epsilon = widen_epsilon(x, axis, epsilon)
    y = _affine(x.astype(computed), mean, var, scale, bias, epsilon)
    return _activated(activation, y).astype(dtype)


def _affine(x, mean, var, scale, bias, epsilon):
    factor = inverse_std(var.astype(jnp.finfo(x.dtype).dtype), epsilon)
    y = (x - mean) * (factor if scale is None else factor * scale)
    return y if bias is None else y + bias


def _activated(activation, y):
    if activation is None:
        return y
    z = activation(y)
    if getattr(z, "shape", None) != y.shape:
        raise ValueError(
            f"an activation that makes {getattr(z, 'shape', z)} of shape {y.shape}: one that "
            "does not keep the shape is applied to the result, not within"
        )
    return z


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(static, at, batch):
    return _activated(static.activation, _linear(static, at, batch)).astype(static.dtype)


@_normalize.defjvp
@promoting
def _normalize_jvp(static, primals, tangents):
    (at, batch), (d, _) = primals, tangents
    d = d._replace(w=None)  # float0 of a bool mask
    y = _normalize(static, at, batch)
    # Whatever the arguments and the moments determine the backward pass computes again.
    dy = jax.checkpoint(functools.partial(_tangent, static), prevent_cse=False)(at, batch, d)
    return y, dy.astype(y.dtype)


def _linear(static, at, batch):
    mean, var = widen(at.x, static.axis, mean=batch.mean, var=batch.var)
    x = at.x.astype(accumulation_dtype(at.x))
    return _affine(x, mean, var, at.scale, at.bias, at.epsilon)


def _has_rule(axis_name) -> bool:
    """Not over an axis of vmap: if that is jitted, JAX runs rules when its name is gone."""
    return axis_name is None or _sync.on_devices(axis_name)


def _by_autodiff(static, at, batch):
    mean, var = widen(at.x, static.axis, mean=batch.mean, var=batch.var)
    s = lax.stop_gradient(unit(var))
    h = (at.x.astype(accumulation_dtype(at.x)) - mean) * s
    fine = True if at.w is None else counts(at.w) | jnp.isfinite(h)
    y = _affine(jnp.where(fine, h, 0), 0, (var + at.epsilon) * s**2, at.scale, at.bias, 0)
    return _activated(static.activation, jnp.where(fine, y, jnp.nan))


def _tangent(static, at, batch, d):
    mean, var = widen(at.x, static.axis, mean=batch.mean, var=batch.var)
    count = jnp.broadcast_to(batch.count, batch.var.shape)
    (count,) = widen(at.x, static.axis, count=count)
    reduced = split_axes(at.x.shape, static.axis)[1]
    total = functools.partial(_total, static, at.x)
    terms = tangent(at, mean, var, count, d, reduced=reduced, total=total)
    dtype = static.dtype if static.activation in EXACT else mean.dtype
    if static.activation is None:
        return _added(terms, dtype)

    def through_activation(at, batch, terms):
        found = []
        for term in terms:
            # A mean for each: else XLA would store the mask after all.
            batch = batch._replace(mean=lax.optimization_barrier(batch.mean))
            z = _linear(static, at, batch)
            found.append(jax.jvp(static.activation, (z,), (term.astype(z.dtype),))[1])
        return functools.reduce(operator.add, found)

    def at_once(at, batch, terms):
        return through_activation(at, batch, (_added(terms, dtype),))

    once = dict.fromkeys(_one_mask(), at_once)
    return lax.platform_dependent(at, batch, terms, **once, default=through_activation)


def _one_mask() -> tuple[str, ...]:
    """The platforms on which the activation's derivative is taken once, not for each term.

    XLA on CPU adds up an array several times as fast as what is computed from two. On a GPU it
    may store the mask, at a byte for an element, and read it for each pass that has use for it
    (`benchmarks.passes`).
    """
    return ("cpu",)


def _added(terms, dtype):
    """Their sum, which can be rounded to this dtype, as transposed can the cotangent."""
    if is_stored_wide(dtype):
        return rounded_sum(*terms, dtype=dtype)
    return functools.reduce(operator.add, terms)


def _total(static, x, sums):
    if static.axis_name is None:
        return sums
    return _vary_like(x, _sync.all_reduce(sums, static.axis_name, static.axis_index_groups))


def _varying_alike(tree):
    """Makes each array vary over all the mesh axes over which any of them does.

    Only under `shard_map(check_vma=True)`, where it tells JAX that a replicated value is
    from here on each device's own, so that its cotangent is summed over the devices.
    """
    return vary(tree, varying(tree))


def _vary_like(x, tree):
    """Made to vary as one array: the transpose, an all-reduce, is one as well."""
    flat, unravel = ravel_pytree(tree)
    return unravel(vary(flat, varying(x)))


def refuse_single(shape, axis, axis_name=None, groups=None) -> None:
    """Raises a ValueError, as torch does, where there is one element per feature.

    Its variance is 0, and its y is the bias whatever it is.
    """
    reduced = split_axes(shape, axis)[1]
    elements = math.prod(shape[a] for a in reduced)
    if elements == 1 and axis_name is not None:
        elements = min(map(len, groups)) if groups else lax.axis_size(axis_name)
    if elements == 1:
        raise ValueError(
            f"one element per feature in an input of shape {shape} with feature axis "
            f"{axis}: it has no variance to normalise by (allow_single=True to go on)"
        )


def result_type(dtype: DTypeLike | None, *arrays: jax.Array | None) -> jnp.dtype:
    """dtype, or what the arrays that are given promote to."""
    if dtype is None:
        return jnp.result_type(*(v for v in arrays if v is not None))
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"dtype={dtype}: y is of floating-point numbers, such as float32")
    return dtype


def _hashable(v: Any) -> Any:
    """v, of tuples in place of lists."""
    return tuple(map(_hashable, v)) if isinstance(v, Iterable) else v
