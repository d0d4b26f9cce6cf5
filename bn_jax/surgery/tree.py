"""The variables of a model and of its layers, in the trees of Linen and the State of NNX.

Their kinds have the names of NNX's types, `nnx.Param` and `nnx.BatchStat`, for Linen too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, traverse_util
from flax.core import unfreeze

from bn_jax.surgery.intercept import Linen, Model, Path

COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
Leaves = dict[str, jax.Array]


def flat(variables: Any, kind: Any = nnx.Variable) -> dict[Path, Any]:
    """The parameters and running statistics, or those of one kind, by path, the name last.

    As they are stored: in a Variable or a box of metadata, and without values perhaps. Of a
    State without a kind all Variables, since those of a layer may be of types of their own.
    """
    if isinstance(variables, nnx.State):
        return {p: v for p, v in nnx.to_flat_state(variables) if isinstance(v, kind)}
    found = {}
    for collection, its_kind in COLLECTIONS.items():
        if issubclass(its_kind, kind):
            found |= traverse_util.flatten_dict(variables.get(collection, {}))
    return found


def value(v: Any) -> jax.Array:
    """The array that a Variable or a box holds."""
    return v.get_value() if isinstance(v, nnx.Variable) else nn.unbox(v)


def by_layer(variables: Any, kind: Any = nnx.Param | nnx.BatchStat) -> dict[Path, Leaves]:
    """The parameters and running statistics of every path, by their names."""
    found: dict[Path, Leaves] = defaultdict(dict)
    for path, v in flat(variables, kind).items():
        found[path[:-1]][path[-1]] = value(v)
    return dict(found)


def get_leaves(variables: Any, path: Path, kind: Any = nnx.Variable) -> Leaves:
    """The parameters and running statistics of the layer at `path`, by their names."""
    found = flat(variables, kind)
    return {p[-1]: value(v) for p, v in found.items() if p[:-1] == path}


def get_stats(variables: Any, path: Path) -> Leaves:
    """The running statistics of the layer at `path`: mean, var and perhaps count."""
    return get_leaves(variables, path, nnx.BatchStat)


def set_leaves(variables: Any, new: dict[Path, Leaves]) -> Any:
    """The variables with other values in some layers, of the dtype and metadata they had."""
    values = {(*path, name): v for path, leaves in new.items() for name, v in leaves.items()}
    if isinstance(variables, nnx.State):
        old = dict(nnx.to_flat_state(variables))
        return nnx.from_flat_state(old | {p: _like(v, old[p]) for p, v in values.items()})
    changed = dict(variables)
    for c in COLLECTIONS:
        old = traverse_util.flatten_dict(variables.get(c, {}), keep_empty_nodes=True)
        if here := {p: _like(v, old[p]) for p, v in values.items() if p in old}:
            changed[c] = traverse_util.unflatten_dict(old | here)
    return changed


def _like(v, old):
    if isinstance(old, nnx.Variable):
        return old.replace(v.astype(old.dtype))
    if isinstance(old, nn.meta.AxisMetadata):
        return old.replace_boxed(v.astype(old.unbox().dtype))
    return v.astype(old.dtype)


def replace_leaves(
    model: Model, variables: Any, new: dict[Path, Leaves], gone: Collection[Path]
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
    changed = set_leaves(variables, new)
    ours = {c: v for c, v in changed.items() if c in COLLECTIONS}
    kept = {p: v for p, v in traverse_util.flatten_dict(ours).items() if p[1:-1] not in gone}
    for path, leaves in new.items():
        for name, v in leaves.items():
            kept.setdefault(("params", *path, name), v)
    kept = traverse_util.unflatten_dict(kept)
    changed |= {c: kept.get(c, {}) for c in ours}
    return {name: v for name, v in changed.items() if v or name == "params"}


def split(variables: Any) -> tuple[Any, Any]:
    """The parameters, and all other variables, of Linen in dicts as a model returns them."""
    if isinstance(variables, nnx.State):
        return nnx.split_state(variables, nnx.Param, ...)
    return variables["params"], unfreeze({n: v for n, v in variables.items() if n != "params"})


def join(params: Any, state: Any) -> Any:
    """The variables that `split` has split."""
    if isinstance(state, nnx.State):
        return nnx.merge_state(params, state)
    return {"params": params, **state}


def like(variables: Any, new: Any) -> Any:
    """New values of the same variables in the containers of these, FrozenDicts among them."""
    return jax.tree.unflatten(jax.tree.structure(variables), jax.tree.leaves(new))
