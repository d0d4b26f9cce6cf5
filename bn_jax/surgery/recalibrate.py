"""Running statistics by a pass over data, for inference with the weights as they are now.

Weights move while a running average is taken, and after weights were averaged there is none
at all. What inference should use are the population statistics of the final weights (Ioffe &
Szegedy 2015, Algorithm 2; Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bn_jax.core.moments import Moments, merge
from bn_jax.core.population import pooled
from bn_jax.core.running import has_variance
from bn_jax.core.running import skip_nonfinite as leave_out_nonfinite
from bn_jax.surgery.calls import BatchNorms, Path, listed, spelled
from bn_jax.surgery.intercept import Model, known
from bn_jax.surgery.observe import Inputs, Pattern, batch_moments, fitting, numbered, used
from bn_jax.surgery.tree import layer_leaves, layer_places, set_leaves, with_streams_of


def recalibrate(
    model: Model,
    variables: Any,
    batches: Iterable[Any],
    *,
    population: Callable[[Iterable[Moments]], Moments] = pooled,
    layer_by_layer: bool = False,
    only: Pattern = "*",
    skip_nonfinite: bool = False,
    batch_norms: BatchNorms | None = None,
    **call: Any,
) -> Any:
    """The variables with the population statistics of `batches` in every BatchNorm.

    A batch counts with the number of its elements. It may be sharded over devices: the
    statistics are those of all of it. The program is compiled once for each shape of batch.

        averaged = recalibrate(model, {**variables, "params": average}, batches, train=True)

    Every batch has random numbers of its own: from Linen's `rngs` by `jax.random.fold_in` of
    its number; in NNX the streams go on from batch to batch. An `axis_name` that nobody has
    bound is an axis of one device. NNX layers that have their statistics in common get those
    of what all of them see.

    Layers that use running statistics though the call is in training (in Flax by their
    constructor) stay as they are.

    Args:
      model, variables: see `bn_jax.surgery`.
      batches: of inputs: arrays, or tuples of the model's positional arguments; not labels.
      population: `bn_jax.core.population.pooled`, or `algorithm_2` for the mean of the
        unbiased variances.
      layer_by_layer: give a layer the statistics of what it will see, its predecessors
        normalising with theirs, rather than with those of each batch; one pass over
        `batches`, which must be a collection then, for each layer.
      only: the layers to recalibrate, by globs over paths as in `freeze`; the others do as
        the call says.
      skip_nonfinite: leave a batch out of the statistics of a feature where its moments are
        not finite.
      batch_norms: further classes of BatchNorms; see `Adapter`.
      **call: what puts the model into training mode, `train=True` for instance.

    Returns:
      Variables of the same structure; only `batch_stats` (NNX: BatchStat) of BatchNorms
      differ, and a count of updates among them is the number of batches.

    Raises:
      ValueError: no batches; no BatchNorm is called, or one of a class that is not known; the
        model, or a layer in `only`, is in evaluation; moments that are not finite; no
        variance, where every batch has one element.
    """
    if layer_by_layer and iter(batches) is batches:
        raise ValueError("layer_by_layer reads the batches several times: pass a list")
    first, batches = _peek(batches)
    norms = known(batch_norms)
    found = used(model, variables, *Inputs.of(first).args, norms=norms, **call)
    groups = _sharing(model, variables, found.calls, _chosen(found.calls, only))
    passes = [(sum(groups[:i], ()), [group]) for i, group in enumerate(groups)]
    for inference, wanted in passes if layer_by_layer else [((), groups)]:
        measure = _measurement(model, inference, wanted, norms, found.axes, call)
        seen = _measured(measure, variables, batches, wanted, skip_nonfinite)
        stats = layer_leaves(model, variables, nnx.BatchStat)
        new = {}
        for (path, *_), moments in zip(wanted, seen, strict=True):
            adapter = found.calls[path][0].adapted
            estimate = population(moments)
            _check_variance(path, estimate)
            old = adapter.ours(stats[path])
            new[path] = adapter.theirs(_replaced(old, estimate, len(moments)))
        variables = set_leaves(model, variables, new)
    return variables


def _chosen(calls, only):
    """The layers that `only` names and that are in training."""
    if not calls:
        raise ValueError("nothing to recalibrate: the model calls no BatchNorm")
    fixed = [p for p, of in calls.items() if all(one.use_running_average for one in of)]
    wanted = fitting(calls, only)
    if len(fixed) == len(calls) or (only != "*" and wanted & set(fixed)):
        names = listed([path for path in fixed if path in wanted])
        raise ValueError(
            f"cannot recalibrate in evaluation, {names}: call the model in training "
            "(train=True; in NNX train() before split)"
        )
    return [path for path in calls if path in wanted and path not in fixed]


def _sharing(model, variables, calls, wanted):
    """The layers in the order of the calls, those together that have their mean in common."""
    groups: dict[Path, tuple[Path, ...]] = {}
    places = layer_places(model, variables, nnx.BatchStat)
    means = {path: places[path][of[0].adapter.mean] for path, of in calls.items()}
    shared = {means[path] for path in wanted}
    for path, mean in means.items():
        if mean in shared:
            groups[mean] = (*groups.get(mean, ()), path)
    return list(groups.values())


def _measurement(model, inference, groups, norms, axes, call):
    @jax.jit
    def measure(variables, number, inputs):
        options = {"inference": inference, "norms": norms, "axes": axes}
        options |= numbered(model, call, number)
        found, after = batch_moments(model, variables, *inputs.args, **options)
        seen = [functools.reduce(merge, [found[path] for path in paths]) for paths in groups]
        return seen, jnp.stack([_finite(m) for m in seen]), with_streams_of(variables, after)

    return measure


def _measured(measure, variables, batches, groups, skip):
    """Of each group the Moments of every batch."""
    seen, flags = [], []
    for number, batch in enumerate(batches):
        moments, finite, variables = measure(variables, number, Inputs.of(batch))
        seen.append(moments)
        flags.append(finite)
    # Not before the last: a device computes while the host reads on.
    flags = np.array(jax.device_get(flags))
    bad = ~flags.any(axis=0) if skip else ~flags.all(axis=0)
    if bad.any():
        layer = int(bad.argmax())
        batch = int((~flags[:, layer]).argmax())
        remedy = "it is so of every batch" if skip else "skip_nonfinite=True leaves it out"
        raise ValueError(
            f"batches[{batch}]: what {spelled(groups[layer][0])} is given has moments that are "
            f"not finite; {remedy}"
        )
    if skip:
        seen = [[leave_out_nonfinite(m) for m in moments] for moments in seen]
    return list(zip(*seen, strict=True))


def _finite(m):
    return ((jnp.isfinite(m.mean) & jnp.isfinite(m.var)) | (m.count == 0)).all()


def _check_variance(path, estimate):
    seen, known = estimate.count != 0, has_variance(estimate)
    if seen.any() and not (seen & known).any():
        raise ValueError(
            f"{spelled(path)} has means of the batches and no variance, as no batch has two "
            "elements of a feature: pass larger batches (or population=pooled)"
        )


def _replaced(stats, estimate, batches):
    """A feature of which no batch had an element, or a variance, keeps that statistic."""
    seen = estimate.count != 0
    new = {
        "mean": jnp.where(seen, estimate.mean, stats["mean"]),
        "var": jnp.where(has_variance(estimate), estimate.var, stats["var"]),
        "count": jnp.full(jnp.shape(stats.get("count", 0)), batches, jnp.int32),
    }
    return {name: new[name] for name in stats if name in new}


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


def reset(
    model: Model,
    variables: Any,
    *inputs: Any,
    batch_norms: BatchNorms | None = None,
    **call: Any,
) -> Any:
    """The variables with every BatchNorm's mean at 0, variance at 1 and count of updates at 0.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with, to find its layers; shapes are enough
        (`jax.ShapeDtypeStruct`).
      batch_norms: further classes of BatchNorms; see `Adapter`.
    """
    start = {"mean": jnp.zeros_like, "var": jnp.ones_like, "count": jnp.zeros_like}
    new = {}
    stats = layer_leaves(model, variables, nnx.BatchStat)
    found = used(model, variables, *inputs, norms=known(batch_norms), **call)
    for path, (one, *_) in found.calls.items():
        leaves = one.adapted.ours(stats[path])
        ours = {n: start[n](v) for n, v in leaves.items() if n in start}
        new[path] = one.adapted.theirs(ours)
    return set_leaves(model, variables, new)
