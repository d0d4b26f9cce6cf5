"""A layer of any framework: its arrays as they are stored there, and as Flax stores them.

Two layouts meet here. A layer's own arrays are `stored`; Flax's, which every framework's
codecs decode to and encode from, are

    Dense kernel [in, out]                         Conv kernel [*window, in / groups, out]
    ConvTranspose kernel [*window, in, out], of a correlation: transpose_kernel=False
    Embed embedding [rows, features]               bias, scale, mean, var [features]
    count, the number of updates: [] or [features]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Arrays = dict[str, jax.Array]


class Layer(NamedTuple):
    """One layer that has parameters or statistics.

    Attributes:
      name: in its model.
      kinds: what it may be; of arrays without a layer there can be several.
      stored: its arrays, by its framework's names.
      settings: what is known of its hyperparameters, in Flax's terms.
      x, y: shapes of the input and the output, where the model was run.
      channels_first: whether the features of its inputs stand before their positions.
    """

    name: str
    kinds: tuple[str, ...]
    stored: Arrays
    settings: dict[str, Any] = {}  # noqa: RUF012
    x: tuple[int, ...] = ()
    y: tuple[int, ...] = ()
    channels_first: bool = False


class Codec(NamedTuple):
    """How one framework stores one kind of layer.

    Attributes:
      names: of its arrays.
      decode: layer -> arrays in Flax's layout.
      encode: (arrays in Flax's layout, settings) -> arrays as they are stored.
    """

    names: frozenset[str]
    decode: Callable[[Layer], Arrays]
    encode: Callable[[Arrays, dict[str, Any]], Arrays]


class Leaf(NamedTuple):
    """One array: its name there, and what makes Flax's of it and it of Flax's."""

    name: str
    decode: Callable[[jax.Array], jax.Array] = jnp.asarray
    encode: Callable[[jax.Array], jax.Array] = jnp.asarray


def codec(**leaves: Leaf) -> Codec:
    """A codec that takes the arrays one by one; the names are Flax's."""

    def decode(layer):
        return {
            ours: leaf.decode(layer.stored[leaf.name])
            for ours, leaf in leaves.items()
            if leaf.name in layer.stored
        }

    def encode(arrays, settings):
        return {
            leaf.name: leaf.encode(arrays[ours])
            for ours, leaf in leaves.items()
            if ours in arrays
        }

    return Codec(frozenset(leaf.name for leaf in leaves.values()), decode, encode)


def vector(name: str) -> Leaf:
    """Of one value per feature, which some frameworks store with axes of size 1."""
    return Leaf(name, lambda v: v.reshape(-1))


def outputs_last(v: jax.Array) -> jax.Array:
    """[out, in, *window] to [*window, in, out]."""
    return jnp.transpose(v, (*range(2, v.ndim), 1, 0))


def outputs_first(v: jax.Array) -> jax.Array:
    """[*window, in, out] to [out, in, *window]."""
    return jnp.transpose(v, (v.ndim - 1, v.ndim - 2, *range(v.ndim - 2)))


def transposed(v: jax.Array) -> jax.Array:
    """The kernel with `transpose_kernel` of the one without, and conversely.

    Of the transpose of a convolution it is [*window, out, in], and the correlation that it
    is has the window reversed.
    """
    return jnp.flip(jnp.swapaxes(v, -2, -1), range(v.ndim - 2))


def single_count(count: jax.Array) -> jax.Array:
    """The number of updates, [], of which other frameworks have one for all features.

    Raises:
      ValueError: the features differ in it.
    """
    least, most = int(count.min()), int(count.max())
    if least != most:
        raise ValueError(
            f"of the features some have {least} updates and some {most}, and other frameworks "
            "count for all at once: set one count for all first"
        )
    return count.reshape(-1)[0]


def stored_array(value: Any, name: str) -> jax.Array:
    """A copy of an array of any framework.

    A copy, because another framework trains in place.

    Raises:
      TypeError: NumPy cannot read it.
    """
    try:
        return jnp.array(value, copy=True)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{name}, of {type(value).__name__}, cannot be read as an array ({error}): pass "
            "arrays on the host, in a dtype that NumPy has (state_dict of model.float().cpu())"
        ) from error


def numpy(v: jax.Array) -> Any:
    """A NumPy array of its own memory, which may be written to."""
    return jax.device_get(v).copy()


def is_a(value: Any, names: dict[str, str]) -> str | None:
    """What `names` has for the first of the value's classes that it knows.

    By the names of the classes, so that no framework needs to be imported.
    """
    classes = (c.__name__ for c in inspect.getmro(type(value)))
    return next((names[name] for name in classes if name in names), None)


def described(layer: Layer, arrays: Arrays) -> str:
    """The layer's name, kind and shapes."""
    shapes = ", ".join(f"{name} {v.shape}" for name, v in arrays.items())
    return f"{layer.name or 'the layer'} ({' or '.join(layer.kinds)}: {shapes})"
