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

from bn_jax.surgery.calls import Path
from bn_jax.surgery.intercept import Linen, Model, Variables, check_model

COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
Leaves = dict[str, jax.Array]


def flat(variables: Variables, kind: Any = nnx.Variable) -> dict[Path, Any]:
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


def by_layer(variables: Variables, kind: Any = nnx.Param | nnx.BatchStat) -> dict[Path, Leaves]:
    """The parameters and running statistics of every path, by their names."""
    found: dict[Path, Leaves] = defaultdict(dict)
    for path, v in flat(variables, kind).items():
        found[path[:-1]][path[-1]] = value(v)
    return dict(found)


def layer_places(
    model: Model | None, variables: Variables, kind: Any = nnx.Param | nnx.BatchStat
) -> dict[Path, dict[str, Path]]:
    """Where the variables of each layer are stored, by their names.

    In NNX that is elsewhere for a Variable that several layers have: a State has it once, and
    without a model it is taken for one layer's.
    """
    if model is not None:
        check_model(model)
    found: dict[Path, dict[str, Path]] = defaultdict(dict)
    for path in flat(variables, kind):
        found[path[:-1]][path[-1]] = path
    if isinstance(model, nnx.GraphDef) and isinstance(variables, nnx.State):
        stored = nnx.to_flat_state(variables)
        numbered = [
            (p, v.replace(i) if isinstance(v, nnx.Variable) else v)  # or a bare array
            for i, (p, v) in enumerate(stored)
        ]
        module = nnx.merge(model, nnx.from_flat_state(numbered))
        for path, layer in nnx.iter_modules(module):
            for name, v in vars(layer).items():
                if isinstance(v, kind):
                    found[path][name] = stored[v.get_value()][0]
    return dict(found)


def layer_leaves(
    model: Model, variables: Variables, kind: Any = nnx.Param | nnx.BatchStat
) -> dict[Path, Leaves]:
    """The parameters and running statistics of every layer, by their names.

    As `by_layer`, but those that several layers have in common are given for each.
    """
    stored = flat(variables, kind)
    return {
        path: {name: value(stored[place]) for name, place in names.items()}
        for path, names in layer_places(model, variables, kind).items()
    }


def get_leaves(model: Model, variables: Variables, path: Path) -> Leaves:
    """The parameters and running statistics of the layer at `path`, by their names."""
    return layer_leaves(model, variables).get(path, {})


def set_leaves(model: Model, variables: Variables, new: dict[Path, Leaves]) -> Variables:
    """The variables with other values in some layers, of the dtype and metadata they had."""
    where = layer_places(model, variables, nnx.Variable) if new else {}
    values = {
        where[path][name]: v for path, leaves in new.items() for name, v in leaves.items()
    }
    return set_stored(variables, values)


def set_stored(variables: Variables, values: dict[Path, jax.Array]) -> Variables:
    """The variables with other values at some of the paths of `flat`."""
    if isinstance(variables, nnx.State):
        old = dict(nnx.to_flat_state(variables))
        return nnx.from_flat_state(old | {p: _like(v, old[p]) for p, v in values.items()})
    changed = dict(variables)
    for c in COLLECTIONS:
        old = traverse_util.flatten_dict(variables.get(c, {}), keep_empty_nodes=True)
        if here := {p: _like(v, old[p]) for p, v in values.items() if p in old}:
            changed[c] = traverse_util.unflatten_dict(old | here)
    return like(variables, changed)


def _like(v, old):
    if isinstance(old, nnx.Variable):
        return old.replace(v.astype(old.dtype))
    if isinstance(old, nn.meta.AxisMetadata):
        return old.replace_boxed(v.astype(old.unbox().dtype))
    return v.astype(old.dtype)


def replace_leaves(
    model: Model, variables: Variables, new: dict[Path, Leaves], gone: Collection[Path]
) -> tuple[Model, Variables]:
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
    stored = flat(variables)
    values = {(*path, name): v for path, leaves in new.items() for name, v in leaves.items()}
    changed = dict(set_stored(variables, {p: v for p, v in values.items() if p in stored}))
    ours = {c: v for c, v in changed.items() if c in COLLECTIONS}
    kept = {p: v for p, v in traverse_util.flatten_dict(ours).items() if p[1:-1] not in gone}
    for path, v in values.items():
        kept.setdefault(("params", *path), v)
    kept = traverse_util.unflatten_dict(kept)
    changed |= {c: kept.get(c, {}) for c in ours}
    return {name: v for name, v in changed.items() if v or name == "params"}


def split(variables: Variables) -> tuple[Any, Any]:
    """The parameters, and all other variables, of Linen in dicts as a model returns them."""
    if isinstance(variables, nnx.State):
        params, rest = nnx.split_state(variables, nnx.Param, ...)
        return params, rest
    return variables["params"], unfreeze({n: v for n, v in variables.items() if n != "params"})


def join(params: Any, state: Any) -> Any:
    """The variables that `split` has split."""
    if isinstance(state, nnx.State):
        return nnx.merge_state(params, state)
    return {"params": params, **state}


def like(variables: Variables, new: Any) -> Any:
    """New values of the same variables in the containers of these, FrozenDicts among them."""
    return jax.tree.unflatten(jax.tree.structure(variables), jax.tree.leaves(new))


def with_streams_of(variables: Variables, after: Variables) -> Variables:
    """The variables, with NNX's streams of random numbers as they are after a call."""
    if not (isinstance(variables, nnx.State) and isinstance(after, nnx.State)):
        return variables
    moved = dict(nnx.to_flat_state(after))
    return nnx.from_flat_state(
        (p, moved[p] if isinstance(v, nnx.RngState) else v)
        for p, v in nnx.to_flat_state(variables)
    )
