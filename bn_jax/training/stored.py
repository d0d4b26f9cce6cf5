"""States as checkpoints hold them: nested dicts of arrays of plain dtypes, none empty.

Orbax refuses arrays without elements, and takes "a.b" and a, b for the same name.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.errors import UserError


def describe(state: Any) -> list[list]:
    """Name, dtype and shape of every array, those without elements too."""
    return [[name, str(v.dtype), list(v.shape)] for name, v in _named(state)]


def check(like: Any, described: list[list], place: Path) -> None:
    """Compares `like` with what `describe` said of the state that is stored at `place`.

    Raises:
      UserError: naming the first array that differs.
    """
    wanted = describe(like)
    if wanted != described:
        pairs = itertools.zip_longest(described, wanted)
        there, here = next((a, b) for a, b in pairs if a != b)
        raise UserError(
            f"{place} is of another run: it has {_text(there)} where this one has "
            f"{_text(here)}; use its flags, or another folder"
        )


def to_arrays(state: Any) -> dict[str, Any]:
    """The arrays with elements, by the names on their path; keys as the numbers in them.

    With several processes an array that only this one's devices hold is taken to be the same
    in all.
    """

    def stored(leaf):
        leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        local = jax.process_count() > 1 and leaf.is_fully_addressable
        return np.array(leaf) if local else leaf

    return _nested(state, lambda v: v if isinstance(v, np.ndarray) else stored(v))


def to_template(like: Any) -> dict[str, Any]:
    """As `to_arrays(like)`, with what Orbax is to make of each array."""
    return _nested(like, _template)


def from_arrays(like: Any, arrays: dict[str, Any]) -> Any:
    """The state of which Orbax restored `to_template(like)`."""

    def pick(path, leaf):
        leaf = _array(leaf)
        if leaf.size:
            return _as(leaf, functools.reduce(dict.__getitem__, _names(path), arrays))
        numbers = _numbers(leaf)
        return _as(leaf, np.zeros(numbers.shape, numbers.dtype))

    return jax.tree.map_with_path(pick, like)


def _template(leaf):
    numbers, sharding = _numbers(leaf), _sharding(leaf)
    if sharding is None or sharding.is_fully_addressable:
        return np.empty(numbers.shape, numbers.dtype)
    return jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=sharding)


def _as(leaf, value):
    if isinstance(leaf, np.ndarray):
        return np.asarray(value)
    if _is_key(leaf):
        value = jax.random.wrap_key_data(jnp.asarray(value), impl=leaf.dtype)
    sharding = _sharding(leaf)
    # What was not bound to a device must not be: it would not go with arrays of a mesh.
    return jnp.asarray(value) if sharding is None else jax.device_put(value, sharding)


def _sharding(leaf):
    if isinstance(leaf, jax.ShapeDtypeStruct) or (
        isinstance(leaf, jax.Array) and leaf.committed
    ):
        return leaf.sharding
    return None


def _numbers(leaf):
    """Of shape and dtype as they are stored."""
    if not _is_key(leaf):
        return leaf
    return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _array(leaf):
    return leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else np.asarray(leaf)


def _named(state):
    leaves = jax.tree.leaves_with_path(state)
    return [(jax.tree_util.keystr(path), _array(leaf)) for path, leaf in leaves]


def _nested(state, f):
    nested = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        leaf = _array(leaf)
        if leaf.size:
            *outer, last = _names(path)
            inner = functools.reduce(lambda d, name: d.setdefault(name, {}), outer, nested)
            inner[last] = f(leaf)
    return nested


def _names(path):
    """Of a path's keys, so that no two are the same when Orbax joins them with dots."""
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return [quote(key, safe=" ~").replace(".", "%2E") for key in keys] or ["state"]


def _text(described):
    if described is None:
        return "no more arrays"
    name, dtype, shape = described
    return f"{name or 'an array'} {dtype}{shape}"
