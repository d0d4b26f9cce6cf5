"""Batch statistics with a version, and older or foreign ones brought into today's structure.

Version 1: of each BatchNorm `mean` and `var`, and `count` where its estimator, a schedule or
renormalisation averages by the number of updates; [] for `ema`, else one per feature. Trees
without a version are Flax's, another framework's, or from before versions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from bn_jax.surgery.intercept import Path, spelled
from bn_jax.surgery.tree import flat, value

VERSION = 1
COLLECTION = "batch_stats_version"
# What the statistics are called: torch, Keras and praxis, and Flax before its modules.
NAMES = {
    "running_mean": "mean", "running_var": "var", "num_batches_tracked": "count",
    "moving_mean": "mean", "moving_variance": "var",
    "ra_mean": "mean", "ra_var": "var",
}  # fmt: skip
Flat = dict[Path, jax.Array]


class StatsVersion(nnx.Variable):
    """The version of the batch statistics in an `nnx.State`."""


def stamp(variables: Any) -> Any:
    """The variables with the version of their batch statistics, for storage.

    In a collection of its own, `batch_stats_version`: `batch_stats` stays Flax's tree. A
    stamped State is no model's before `migrate` has taken the version off.

    Args:
      variables: of a Linen model, or the `nnx.State` of an NNX model.
    """
    version = jnp.int32(VERSION)
    if isinstance(variables, nnx.State):
        stored = dict(nnx.to_flat_state(variables))
        return nnx.from_flat_state(stored | {(COLLECTION,): StatsVersion(version)})
    return {**variables, COLLECTION: {"version": version}}


def migrate(variables: Any, template: Any, *, count: int | None = None) -> Any:
    """The variables with batch statistics in the structure of the template's, unstamped.

    Leaves with another framework's names (running_mean, moving_variance and the like) get
    ours, a number of updates becomes one for all features or one for each, and every
    statistic takes the dtype of the template's. A count that the template has no place for
    is left out: nothing there depends on it. Nothing else is touched, and nothing is made up.

    Args:
      variables: of a Linen model, or an `nnx.State`, with values (it cannot be traced).
      template: those that the model of today starts with.
      count: the number of updates in layers that lack one and need it.

    Raises:
      TypeError: variables and template of different kinds.
      ValueError: statistics of a later version; a layer or statistic missing or left over;
        a shape or dtype that does not fit; a mean or variance that is not finite, a negative
        variance or count, or counts that differ where one is wanted. By path, with what to do.
    """
    if isinstance(variables, nnx.State) != isinstance(template, nnx.State):
        raise TypeError(
            f"variables of {type(variables).__name__} for a template of "
            f"{type(template).__name__}: bring them over with bn_jax.surgery.convert.from_flax"
        )
    _check_version(variables)
    given, wanted = _renamed(_stats(variables)), _stats(template)
    if count is not None:
        given |= {p: jnp.int32(count) for p in wanted if p[-1] == "count" and p not in given}
    _check_leaves(given, wanted)
    return _replaced(
        variables, template, {path: _fitted(path, given[path], wanted[path]) for path in wanted}
    )


def _check_version(variables):
    stored = variables.get(COLLECTION, {"version": 0})
    version = int(stored[...] if isinstance(stored, nnx.Variable) else stored["version"])
    if version > VERSION:
        raise ValueError(
            f"batch statistics of version {version}, and this bn_jax knows {VERSION} at most: "
            "use a later one"
        )


def _stats(variables) -> Flat:
    return {path: value(v) for path, v in flat(variables, nnx.BatchStat).items()}


def _renamed(stats: Flat) -> Flat:
    renamed: Flat = {}
    for path, v in stats.items():
        name = NAMES.get(path[-1], path[-1])
        if (*path[:-1], name) in renamed:
            raise ValueError(f"{spelled(path)} is a second {name} of its layer: remove one")
        renamed[*path[:-1], name] = v
    return renamed


def _check_leaves(given: Flat, wanted: Flat) -> None:
    """Whole layers first: one that is missing or left over is said once."""
    missing, extra = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    layers = [{path[:-1] for path in stats} for stats in (given, wanted)]
    _refuse(layers[1] - layers[0], "missing: read a tree of this model")
    _refuse(layers[0] - layers[1], "of no layer of the template: take them out, if rightly so")
    counts = {path for path in missing if path[-1] == "count"}
    _refuse(missing - counts, "missing")
    _refuse(counts, "missing: give count=, the number of updates so far")
    _refuse({p for p in extra if p[-1] != "count"}, "not a statistic that the template has")


def _refuse(paths, why):
    if paths:
        names = ", ".join(sorted(map(spelled, paths)))
        raise ValueError(f"batch statistics of {names}: {why}")


def _fitted(path: Path, v: jax.Array, like: jax.Array) -> jax.Array:
    v, name = jnp.asarray(v), spelled(path)
    if _kind(v) != _kind(like):
        raise ValueError(
            f"{name} is of {v.dtype}, and {like.dtype} is wanted: convert it first"
        )
    v = _one_or_each(v, like, name) if path[-1] == "count" else v
    if v.shape != like.shape:
        raise ValueError(
            f"{name} has shape {v.shape}, and {like.shape} is wanted: it is of another model"
        )
    if not jnp.isfinite(v).all():
        raise ValueError(f"{name} is not finite: recalibrate, or read an earlier checkpoint")
    if path[-1] in ("var", "count") and (v < 0).any():
        raise ValueError(f"{name} is negative ({v.min()}): it is no {path[-1]}")
    return v.astype(like.dtype)


def _kind(v):
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    return next((kind for kind in kinds if jnp.issubdtype(v.dtype, kind)), v.dtype)


def _one_or_each(count, like, name):
    """One count for all features, or one for each, as the template has it."""
    if count.ndim == 0:
        return jnp.broadcast_to(count, like.shape)
    if like.ndim == 0 and count.size:
        if (count != count.reshape(-1)[0]).any():
            raise ValueError(
                f"{name} differs between features ({count.min()} to {count.max()}), and the "
                "template has one for all: keep the estimator that it was made with"
            )
        return count.reshape(-1)[0]
    return count


def _replaced(variables, template, stats):
    if isinstance(variables, nnx.State):
        like = dict(nnx.to_flat_state(template))
        kept = {
            path: v
            for path, v in nnx.to_flat_state(variables)
            if not isinstance(v, nnx.BatchStat | StatsVersion)
        }
        return nnx.from_flat_state(
            kept | {path: like[path].replace(v) for path, v in stats.items()}
        )
    kept = {name: v for name, v in variables.items() if name not in (COLLECTION, "batch_stats")}
    stats = {"batch_stats": traverse_util.unflatten_dict(stats)} if stats else {}
    return kept | stats
