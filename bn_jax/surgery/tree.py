"""The variables of single layers, in the trees of Linen and in the State of NNX."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, traverse_util

from bn_jax.surgery.intercept import Linen, Model, Path

COLLECTIONS = ("params", "batch_stats")


def get_leaves(variables: Any, path: Path) -> dict[str, jax.Array]:
    """The parameters and running statistics of the layer at `path`, by their names."""
    if isinstance(variables, nnx.State):
        flat = dict(nnx.to_flat_state(variables))
        return {p[-1]: v[...] for p, v in flat.items() if p[:-1] == path}
    leaves = {}
    for collection in COLLECTIONS:
        flat = traverse_util.flatten_dict(nn.unbox(variables.get(collection, {})))
        leaves |= {p[-1]: v for p, v in flat.items() if p[:-1] == path}
    return leaves


def replace_leaves(
    model: Model,
    variables: Any,
    new: dict[Path, dict[str, jax.Array]],
    gone: Collection[Path],
) -> tuple[Model, Any]:
    """The model with other parameters in some layers, and none in those that are gone.

    And its variables. In NNX the model is another one too, since it lists its variables. A
    parameter keeps its dtype and metadata; one that is new has no metadata.
    """
    if isinstance(model, Linen):
        return model, _replace_linen(variables, new, gone)
    module = nnx.merge(model, variables, copy=True)
    layers = dict(nnx.iter_modules(module))
    for path in gone:
        for name, v in vars(layers[path]).items():
            if isinstance(v, nnx.Variable):
                setattr(layers[path], name, None)
    for path, leaves in new.items():
        for name, v in leaves.items():
            _set_nnx(layers[path], name, v)
    return nnx.split(module)


def _set_nnx(layer, name, v):
    old = getattr(layer, name)
    if old is None:
        setattr(layer, name, nnx.Param(v))
        layer.use_bias = True
    else:
        old.set_value(v.astype(old.dtype))


def _replace_linen(variables, new, gone):
    changed = dict(variables)
    for collection in set(COLLECTIONS) & set(variables):
        flat = traverse_util.flatten_dict(variables[collection])
        changed[collection] = {p: v for p, v in flat.items() if p[:-1] not in gone}
    for path, leaves in new.items():
        for name, v in leaves.items():
            old = changed["params"].get((*path, name))
            changed["params"][*path, name] = v if old is None else _as(v, old)
    for collection in set(COLLECTIONS) & set(variables):
        changed[collection] = traverse_util.unflatten_dict(changed[collection])
    return {name: v for name, v in changed.items() if v or name == "params"}


def _as(v, old):
    if isinstance(old, nn.meta.AxisMetadata):
        return old.replace_boxed(v.astype(old.unbox().dtype))
    return v.astype(old.dtype)
