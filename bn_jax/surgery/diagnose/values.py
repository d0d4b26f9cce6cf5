"""Values that are not finite, and replicas that are not alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from bn_jax.surgery.calls import Path
from bn_jax.surgery.diagnose.findings import Finding
from bn_jax.surgery.diagnose.watch import Watched, finite
from bn_jax.surgery.observe import Inputs


def modules(variables: Any) -> dict[Path, dict[Path, jax.Array]]:
    """The floating-point variables of every module, by collection and name."""
    flat: dict[Any, Any]
    if isinstance(variables, nnx.State):
        flat = {
            ("", *path[:-1], f"{path[-1]}{jax.tree_util.keystr(within)}"): leaf
            for path, v in nnx.to_flat_state(variables)
            for within, leaf in jax.tree_util.tree_leaves_with_path(v.get_value())
        }
    else:
        flat = traverse_util.flatten_dict(nn.unbox(variables))
    found: dict[Any, dict[Any, Any]] = defaultdict(dict)
    for (collection, *path, name), v in flat.items():
        if jnp.issubdtype(v.dtype, jnp.inexact):
            found[tuple(path)][collection, name] = v
    return dict(found)


def check_variables(variables: Any) -> Iterator[Finding]:
    """Parameters and statistics that are not finite."""
    for path, leaves in modules(variables).items():
        bad = {name[-1]: int((~jnp.isfinite(v)).sum()) for name, v in leaves.items()}
        bad = {name: n for name, n in bad.items() if n}
        if bad:
            meaning = "not finite: " + ", ".join(f"{n} of {name}" for name, n in bad.items())
            yield Finding("nonfinite", path, sum(bad.values()), 0, meaning)


def check_activations(runs: Iterable[Watched], variables: Any) -> Iterator[Finding]:
    """The first module that makes what is not finite of finite inputs and variables.

    If there is none, the first BatchNorm whose batch has moments that are not. Of the first
    run that has either.
    """
    sick = [finding.path for finding in check_variables(variables)]
    for run in runs:
        poisoned = [n.path for n in run.norms.values() if not finite(n.seen.moments)]
        if run.breaks is not None:
            if run.breaks not in sick:
                meaning = "its output is not finite, its input is: the first of the model"
                remedy = "look for a division, a logarithm or an overflow in it"
                yield Finding("nonfinite", run.breaks, 1, 0, meaning, remedy)
            return
        if poisoned:
            meaning = "the moments of its input are not finite"
            remedy = "look at the model's inputs, or mask what is padding"
            yield Finding("nonfinite", poisoned[0], 1, 0, meaning, remedy)
            return


def check_replicas(variables: Any, stacked: bool) -> Iterator[Finding]:
    """Variables of which devices have unlike copies.

    Args:
      variables: of the model.
      stacked: whether the copies lie along a first axis, as `jax.pmap` has them.
    """
    for path, leaves in modules(variables).items():
        away = {name[-1]: _disagreement(v, stacked) for name, v in leaves.items()}
        name = max(away, key=away.__getitem__)
        if away[name] > 0:
            meaning = f"{name} differs between devices by {away[name]:.2g} of its largest value"
            yield Finding("replicas_disagree", path, away[name], 0, meaning)


def _disagreement(v, stacked):
    copies = []
    if stacked:
        copies = list(jax.device_get(v))
    elif isinstance(v, jax.Array) and v.sharding.is_fully_replicated:
        copies = [jax.device_get(shard.data) for shard in v.addressable_shards]
    return max((_relative(c, copies[0]) for c in copies[1:]), default=0.0)


def _relative(a, b):
    apart = jnp.where((a == b) | (jnp.isnan(a) & jnp.isnan(b)), 0, jnp.abs(a - b))
    largest = jnp.maximum(jnp.abs(a).max(), jnp.abs(b).max())
    away = apart.max() / jnp.where(largest > 0, largest, 1)
    return float(jnp.nan_to_num(away, nan=1.0, posinf=1.0))


def flat_batch(batch: Any) -> tuple[tuple, int]:
    """The model's inputs `[replicas * n, ...]` of those of `[replicas, n, ...]`; replicas."""
    inputs = Inputs.of(batch)
    flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), inputs)
    return flat.args, len(jax.tree.leaves(inputs)[0])
