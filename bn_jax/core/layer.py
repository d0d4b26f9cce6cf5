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

from bn_jax.core.batch_norm import normalize
from bn_jax.core.moments import Moments
from bn_jax.core.running import BatchStats, each, ema, skip_nonfinite


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
    common = {
        "axis": layer.axis, "epsilon": layer.epsilon,
        "activation": layer.activation, "dtype": layer.dtype,
    }  # fmt: skip
    if use_running_average:
        return normalize(x, stats.mean, stats.var, scale, bias, **common), stats
    y, batch = function(
        x, scale=scale, bias=bias, mask=mask, **common,
        **({} if initializing else _replicas(layer)),
        allow_single=layer.allow_single or initializing,
    )  # fmt: skip
    return y, stats if initializing else updated(layer, stats, batch)


def counts_updates(layer: Any) -> bool:
    """Whether the statistics depend on how many updates there were before."""
    return layer.estimator is not ema or callable(layer.momentum)


def initial_stats(layer: Any, features: tuple[int, ...], dtype: Any) -> BatchStats:
    """What the layer starts from; other averages than `ema` count for each feature."""
    return BatchStats.create(features, dtype, per_feature=layer.estimator is not ema)


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
    estimator = functools.partial(
        layer.estimator, momentum=layer.momentum, unbiased=layer.unbiased
    )
    grouped = batch.mean.ndim > stats.mean.ndim
    return each(estimator, stats, batch) if grouped else estimator(stats, batch)


def stats_dtype(x: jax.Array) -> Any:
    """Of the running mean: float32 whatever x is, or complex64."""
    return jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32


def _replicas(layer):
    replicas = {"axis_name": layer.axis_name}
    if layer.axis_index_groups is not None:
        replicas["axis_index_groups"] = layer.axis_index_groups
    return replicas
