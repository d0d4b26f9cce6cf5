"""How far the outputs of two models are apart, each element by its own scale."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Values without arrays in them.
_PLAIN = (str, bytes, enum.Enum)
# What rounding makes of an array, in units of eps times its largest value.
_ROUNDING = 4
# `perturb` changes numbers by so many eps: more than a sum of 4,000 products is rounded by.
_PERTURBATION = 64
# Of what `perturb` does to a feature, what rounding may do.
_SPREAD = 8


def leaves(output: Any) -> list[Any]:
    """The leaves of what a model returns, those within dataclasses that are no pytrees too.

    Raises:
      ValueError: an object that may have arrays in it, which nobody can see.
    """
    found = []
    for leaf in jax.tree.leaves(output):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        elif isinstance(leaf, _PLAIN) or hasattr(leaf, "dtype") or np.isscalar(leaf):
            found.append(leaf)
        else:
            raise ValueError(
                f"the model returns a {type(leaf).__name__}, which is no pytree: register it, "
                "or return its arrays"
            )
    return found


def array_leaves(output: Any) -> list[Any]:
    """Of `leaves` those that are arrays or numbers."""
    return [leaf for leaf in leaves(output) if not isinstance(leaf, _PLAIN)]


def difference(
    old: Sequence[Any],
    new: Sequence[Any],
    perturbed: Sequence[Any] | None = None,
    *,
    tolerance: float,
    elementwise: bool,
) -> float:
    """The largest difference of two models' outputs for several inputs, by their own scale.

    The scale of an element is the largest absolute value that the old model returns there for
    any of the inputs; or, not `elementwise`, anywhere in its feature, the last axis. It is at
    least so much that rounding errors are within the tolerance: those of the array's largest
    value, and those that `perturbed` shows. Of integers, bools and keys the share that
    differs. Equal infinities, and NaN in both, do not differ; a number and none are infinitely
    far apart.

    Args:
      old, new: outputs for each of the inputs.
      perturbed: those of the old model with its numbers changed by `perturb`. So the network
        itself says what it makes of rounding errors, however deep it is.
      tolerance, elementwise: see above.
    """
    sides = (old, new, old if perturbed is None else perturbed)
    columns = zip(*(zip(*map(leaves, side), strict=True) for side in sides), strict=True)
    found = (_difference(a, b, c, tolerance, elementwise) for a, b, c in columns)
    return float(max(found, default=0))


def _difference(old, new, perturbed, tolerance, elementwise):
    if isinstance(old[0], _PLAIN):
        return 0.0 if old == new else np.inf
    old, new, perturbed = ([_plain(v) for v in side] for side in (old, new, perturbed))
    if not jnp.issubdtype(old[0].dtype, jnp.inexact):
        return max(np.mean(a != b) if a.size else 0.0 for a, b in zip(old, new, strict=True))
    eps = jnp.finfo(old[0].dtype).eps
    old, new, perturbed = (
        [v.astype(np.result_type(v, np.float64)) for v in side]
        for side in (old, new, perturbed)
    )
    sizes = [_finite(a) for a in old]
    with np.errstate(invalid="ignore"):  # of two infinities
        spread = _of_features([_finite(b - a) for a, b in zip(old, perturbed, strict=True)])
    scale = np.maximum.reduce(sizes) if elementwise else _of_features(sizes)
    largest = max((np.max(s, initial=0) for s in sizes), default=0) or 1
    rounding = np.maximum(min(tolerance, _ROUNDING * eps) * largest, _SPREAD * spread)
    scale = np.maximum(scale, rounding / tolerance)
    return max(relative(a, b, scale) for a, b in zip(old, new, strict=True))


def _finite(v):
    """Absolute values, of numbers that are not finite 0."""
    return np.where(np.isfinite(v), np.abs(v), 0)


def _of_features(arrays):
    """The largest value of each feature."""
    axes = tuple(range(arrays[0].ndim - 1))
    return np.maximum.reduce([np.max(v, axis=axes, keepdims=True, initial=0) for v in arrays])


def relative(a: np.ndarray, b: np.ndarray, scale: Any) -> float:
    """The largest |a - b| / scale; infinite where only one of the two is a finite number."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    known = np.isfinite(a) & np.isfinite(b)
    apart = np.abs(np.where(known, a, 0) - np.where(known, b, 0)) / scale
    return float(np.max(np.where(same, 0, np.where(known, apart, np.inf)), initial=0))


def _plain(v):
    if hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
        v = jax.random.key_data(v)
    return np.asarray(v)


def noise(inputs: Any, seed: int = 0) -> Any:
    """Other inputs of the same shapes, dtypes and range.

    Floating-point numbers are uniform between the least and the largest of their array, or
    within 1 of them where they are equal; other arrays have their values in another order, as
    not every integer may be a class or a token.
    """
    rng = np.random.default_rng(seed)

    def uniform(v):
        low, high = float(v.min()), float(v.max())
        return rng.uniform(*((low, high) if low < high else (low - 1, high + 1)), v.shape)

    def drawn(v):
        if not (v.size and jnp.issubdtype(v.dtype, jnp.inexact)):
            return v.reshape(-1)[rng.permutation(v.size)].reshape(v.shape)
        return uniform(v.real) + 1j * uniform(v.imag) if jnp.iscomplexobj(v) else uniform(v)

    return _each_array(lambda v: drawn(np.asarray(v)), inputs)


def perturb(tree: Any, seed: int = 0) -> Any:
    """The tree with its floating-point numbers changed by 64 eps, up or down at random."""
    rng = np.random.default_rng(seed)

    def changed(v):
        if not jnp.issubdtype(v.dtype, jnp.inexact):
            return np.asarray(v)
        step = _PERTURBATION * jnp.finfo(v.dtype).eps
        return np.asarray(v) * (1 + step * rng.choice([-1, 1], v.shape))

    return _each_array(changed, tree)


def _each_array(function, tree):
    """A function of each array but keys, in the array's dtype and on its devices."""

    def one(v):
        if not hasattr(v, "dtype") or jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
            return v
        new = function(v).astype(v.dtype)
        return jax.device_put(new, v.sharding) if isinstance(v, jax.Array) else new

    return jax.tree.map(one, tree)


def widen(tree: Any) -> Any:
    """The floating-point arrays of a tree in float64; for `jax.enable_x64`."""

    def one(v):
        if not hasattr(v, "dtype") or not jnp.issubdtype(v.dtype, jnp.inexact):
            return v
        return v.astype(jnp.promote_types(v.dtype, jnp.float64))

    return jax.tree.map(one, tree)


def nonfinite(tree: Any) -> int:
    """How many of the floating-point numbers of a tree are not finite."""
    return sum(
        int((~jnp.isfinite(v)).sum())
        for v in array_leaves(tree)
        if jnp.issubdtype(jnp.result_type(v), jnp.inexact)
    )


def comparable(output: Any) -> bool:
    """Whether an output has a number to compare, a finite one among floats, and no NaN."""
    arrays = [_plain(v) for v in array_leaves(output)]
    floats = [v for v in arrays if jnp.issubdtype(v.dtype, jnp.inexact) and v.size]
    if not floats:
        return not arrays or any(v.size for v in arrays)
    return any(np.isfinite(v).any() for v in floats) and not any(
        np.isnan(v).any() for v in floats
    )


def arrays_among(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree, and how others take their places; `True` stays what it is."""
    found, structure = jax.tree.flatten(tree)
    places = [i for i, v in enumerate(found) if hasattr(v, "dtype")]

    def replaced(arrays):
        new = dict(enumerate(found)) | dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(structure, new.values())

    return [found[i] for i in places], replaced
