"""What a layer does with its variables, for Linen and NNX alike.

A layer is anything with the fields of `bn_jax.linen.BatchNorm`; it owns the variables, and
here they are arrays that come in and go out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax.core.batch_norm import normalize
from bn_jax.core.eager import one_program
from bn_jax.core.moments import Moments
from bn_jax.core.numbers import check_epsilon, check_momentum
from bn_jax.core.running import BatchStats, cumulative_mean, each, ema, skip_nonfinite


def forward(
    layer: Any,
    function: Callable[..., tuple[jax.Array, Moments]],
    x: jax.Array,
    stats: BatchStats,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    use_running_average: bool,
    mask: jax.Array | None,
    initializing: bool = False,
) -> tuple[jax.Array, BatchStats]:
    """y, and the running statistics after this batch.

    Args:
      layer: the settings.
      function: `batch_norm`, or a variant of it that takes the same arguments.
      x, scale, bias, mask: as in `batch_norm`.
      stats: the running statistics before this batch.
      use_running_average: normalise by `stats`, and return them as they are.
      initializing: one example and no mapped axis are customary, and nothing is learnt.
    """
    common = {n: getattr(layer, n) for n in ("axis", "epsilon", "activation", "dtype")}
    if use_running_average:
        return normalize(x, stats.mean, stats.var, scale, bias, **common), stats
    common |= {} if initializing else _replicas(layer)
    common |= {"allow_single": layer.allow_single or initializing}
    y, batch = function(x, scale=scale, bias=bias, mask=mask, **common)
    return y, stats if initializing else updated(layer, stats, batch)


def counts_updates(layer: Any) -> bool:
    """Whether the statistics depend on how many updates there were before."""
    return layer.estimator is not ema or callable(layer.momentum)


def initial_stats(layer: Any, features: tuple[int, ...], dtype: DTypeLike) -> BatchStats:
    """What the layer starts from; other averages than `ema` count for each feature."""
    return BatchStats.create(features, dtype, per_feature=layer.estimator is not ema)


def check_settings(layer: Any) -> None:
    """Raises a TypeError or ValueError that names a setting which makes no sense.

    momentum is a number or a schedule, or None for `cumulative_mean`, which has none.
    """
    without = layer.momentum is None and layer.estimator is cumulative_mean
    if not (callable(layer.momentum) or without):
        check_momentum(layer.momentum)
    check_epsilon(layer.epsilon)


def check_call(layer: Any, **given: jax.Array | None) -> None:
    """Raises a ValueError where the call gives what the layer has as a parameter."""
    for name, v in given.items():
        if v is not None and getattr(layer, f"use_{name}"):
            raise ValueError(
                f"{name} given in the call of a layer that has its own: construct it with "
                f"use_{name}=False"
            )


def updated(layer: Any, stats: BatchStats, batch: Moments) -> BatchStats:
    """The running statistics after a batch, or after one group of Moments after another."""
    batch = jax.lax.stop_gradient(batch)
    batch = skip_nonfinite(batch) if layer.skip_nonfinite else batch
    settings = {"momentum": layer.momentum, "unbiased": layer.unbiased}
    if batch.mean.ndim > stats.mean.ndim:
        return _after_groups((layer.estimator, *settings.values()), stats, batch)
    return layer.estimator(stats, batch, **settings)


@one_program
def _after_groups(settings, stats, groups):
    estimator, momentum, unbiased = settings
    one = functools.partial(estimator, momentum=momentum, unbiased=unbiased)
    return each(one, stats, groups)


def dtype_of_stats(param_dtype: DTypeLike, *, of_complex: bool) -> jnp.dtype:
    """The dtype of the running mean: the wider of float32 and param_dtype, real or complex."""
    wide = jnp.finfo(jax.dtypes.canonicalize_dtype(param_dtype)).dtype == jnp.float64
    if of_complex:
        return jnp.dtype(jnp.complex128 if wide else jnp.complex64)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _replicas(layer):
    replicas = {"axis_name": layer.axis_name}
    if layer.axis_index_groups is not None:
        replicas["axis_index_groups"] = layer.axis_index_groups
    return replicas
