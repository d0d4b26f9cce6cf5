"""Running statistics by a pass over data, for inference with the weights as they are now.

Weights move while a running average is taken, and after weights were averaged there is none
at all. What inference should use are the population statistics of the final weights (Ioffe &
Szegedy 2015, Algorithm 2; Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from bn_jax.core.moments import Moments
from bn_jax.core.population import pooled
from bn_jax.surgery.intercept import Model
from bn_jax.surgery.layers import batch_moments, layer_paths
from bn_jax.surgery.tree import get_stats, set_leaves


def recalibrate(
    model: Model,
    variables: Any,
    batches: Iterable[Any],
    *,
    population: Callable[[Iterable[Moments]], Moments] = pooled,
    layer_by_layer: bool = False,
    **call: Any,
) -> Any:
    """The variables with the population statistics of `batches` in every BatchNorm.

    A batch counts with the number of its elements. It may be sharded over devices: the
    statistics are those of all of it. The program is compiled once for each shape of batch.

        averaged = recalibrate(model, {**variables, "params": average}, batches, train=True)

    Args:
      model, variables: see `bn_jax.surgery`.
      batches: of inputs: arrays, or tuples of the model's positional arguments; not labels.
      population: `bn_jax.core.population.pooled`, or `algorithm_2` for the mean of the
        unbiased variances.
      layer_by_layer: give a layer the statistics of what it will see, its predecessors
        normalising with theirs, rather than with those of each batch; one pass over
        `batches`, which must be a collection then, for each layer.
      **call: what puts the model into training mode, `train=True` for instance.

    Returns:
      Variables of the same structure; only `batch_stats` (NNX: BatchStat) differ, and a
      count of updates among them is the number of batches.

    Raises:
      ValueError: no batches, or no BatchNorm is called.
    """

    if layer_by_layer and iter(batches) is batches:
        raise ValueError("layer_by_layer reads the batches several times: pass a list")
    first, batches = _peek(batches)
    paths = layer_paths(model, variables, *_inputs(first), **call)
    if not paths:
        raise ValueError("nothing to recalibrate: the model calls no BatchNorm")
    passes = [(paths[:i], [path]) for i, path in enumerate(paths)]
    for inference, wanted in passes if layer_by_layer else [((), paths)]:
        measure = _measurement(model, tuple(inference), wanted, call)
        seen = [measure(variables, _inputs(batch)) for batch in batches]
        estimates = map(population, zip(*seen, strict=True))
        new = {
            path: _replaced(get_stats(variables, path), estimate, len(seen))
            for path, estimate in zip(wanted, estimates, strict=True)
        }
        variables = set_leaves(variables, new)
    return variables


def _measurement(model, inference, wanted, call):
    @jax.jit
    def measure(variables, inputs):
        found = batch_moments(model, variables, *inputs, inference=inference, **call)
        return [found[path] for path in wanted]

    return measure


def _replaced(stats, estimate, batches):
    """A feature of which no batch had an element keeps its statistics."""
    seen = estimate.count > 0
    new = {
        "mean": jnp.where(seen, estimate.mean, stats["mean"]),
        "var": jnp.where(seen, estimate.var, stats["var"]),
        "count": jnp.full(jnp.shape(stats.get("count", 0)), batches, jnp.int32),
    }
    return {name: new[name] for name in stats}


def _peek(batches):
    """The first of the batches, and all of them."""
    if iter(batches) is not batches:
        first = next(iter(batches), None)
    else:
        first = next(batches, None)
        batches = itertools.chain([first], batches)
    if first is None:
        raise ValueError("nothing to recalibrate by: there are no batches")
    return first, batches


def _inputs(batch):
    return batch if isinstance(batch, tuple) else (batch,)


def reset(model: Model, variables: Any, *inputs: Any, **call: Any) -> Any:
    """The variables with every BatchNorm's mean at 0, variance at 1 and count of updates at 0.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with, to find its layers; shapes are enough
        (`jax.ShapeDtypeStruct`).
    """
    start = {"mean": jnp.zeros_like, "var": jnp.ones_like, "count": jnp.zeros_like}
    new = {}
    for path in layer_paths(model, variables, *inputs, **call):
        stats = get_stats(variables, path)
        new[path] = {name: start[name](v) for name, v in stats.items()}
    return set_leaves(variables, new)
