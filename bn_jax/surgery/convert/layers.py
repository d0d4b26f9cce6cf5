"""A layer of any framework: its arrays as they are stored there, and as Flax stores them.

Two layouts meet here. A layer's own arrays are `stored`; Flax's, to which they are decoded, are

    Dense kernel [in, out]                         Conv kernel [*window, in / groups, out]
    ConvTranspose kernel [*window, in, out], of a correlation: transpose_kernel=False
    Embed embedding [rows, features]               bias, scale, mean, var [features]
    count, the number of updates: [] or [features]
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.core.running import BatchStats

Arrays = dict[str, jax.Array]
Turn = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array: its name there, and what makes Flax's of it and it of Flax's."""

    name: str
    decode: Turn = jnp.asarray
    encode: Turn = jnp.asarray


Codec = dict[str, Leaf]  # how a layer is stored, by Flax's names


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyperparameters that must agree in a pair, in Flax's terms; None is not known."""

    epsilon: float | None = None
    estimator: Callable[..., BatchStats] | None = None
    feature_group_count: int | None = None
    kernel_dilation: tuple[int, ...] | None = None
    layer: str | None = None
    momentum: float | Callable[[jax.Array], jax.Array] | None = None
    num_groups: int | None = None
    padding: str | tuple[tuple[int, int], ...] | None = None
    padding_mode: str | None = None
    strides: tuple[int, ...] | None = None
    unbiased: bool | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer that has parameters or statistics.

    The codecs are by the kinds that it may be. A layer that is not converted has none, and
    arrays without a layer may have several.
    """

    name: str
    stored: Arrays  # by its framework's names
    codecs: Mapping[str, Codec] = dataclasses.field(default_factory=dict)
    settings: Settings = Settings()
    x: tuple[int, ...] = ()  # shape of the input, where the model was run
    features: tuple[int, ...] = ()  # of a Dense of Flax, shape of the outputs
    channels_first: bool = False  # whether the features stand before their positions
    cls: type | None = None  # where it is an object

    @property
    def kind(self) -> str:
        """The first kind that it may be."""
        return next(iter(self.codecs))

    def decoded(self, kind: str) -> Arrays:
        """Its arrays in Flax's layout; one that this kind does not have keeps its name."""
        leaves = {leaf.name: (ours, leaf) for ours, leaf in self.codecs[kind].items()}
        known = ((v, *leaves.get(n, (n, Leaf(n)))) for n, v in self.stored.items())
        return {ours: leaf.decode(v) for v, ours, leaf in known}

    def encoded(self, kind: str, arrays: Arrays) -> Arrays:
        """Arrays of Flax's layout in the names, shapes and dtypes of its own."""
        new = encode(self.codecs[kind], arrays)
        return {n: _fitted(v, self.stored[n]) for n, v in new.items() if n in self.stored}

    def described(self, arrays: Arrays) -> str:
        """Its name and kind, and the shapes of the arrays."""
        shapes = ", ".join(f"{name} {v.shape}" for name, v in arrays.items())
        return f"{self.name or 'the layer'} ({' or '.join(self.codecs)}: {shapes})"


def encode(codec: Codec, arrays: Arrays) -> Arrays:
    """Arrays of Flax's layout as they are stored."""
    return {leaf.name: leaf.encode(arrays[n]) for n, leaf in codec.items() if n in arrays}


def _fitted(v, like):
    v = v if v.size == like.size else jnp.broadcast_to(v, like.shape)
    return v.reshape(like.shape).astype(like.dtype)


def window(rank: int, strides: Any, dilation: Any, padding: Any, **more: Any) -> Settings:
    """The settings of a convolution, with one value or pair for each of `rank` axes."""

    def each(v: Any, n: int = rank) -> tuple[Any, ...]:
        return tuple(v) if isinstance(v, Sequence) else (1 if v is None else v,) * n

    named = isinstance(padding, str)
    pads: Any = padding.upper() if named else tuple(each(p, 2) for p in each(padding))
    return Settings(strides=each(strides), kernel_dilation=each(dilation), padding=pads, **more)


def transposed(v: jax.Array) -> jax.Array:
    """The kernel with `transpose_kernel` of the one without, and conversely.

    Of the transpose of a convolution it is [*window, out, in], and the correlation that it
    is has the window reversed.
    """
    return jnp.flip(jnp.swapaxes(v, -2, -1), range(v.ndim - 2))


def single_count(count: jax.Array | int) -> jax.Array:
    """The number of updates, [], of which other frameworks have one for all features.

    Raises:
      ValueError: the features differ in it.
    """
    count = jnp.asarray(count).reshape(-1)
    if (count != count[:1]).any():
        raise ValueError(
            f"of the features some have {count.min()} updates and some {count.max()}, and "
            "other frameworks count for all at once: set one count for all first"
        )
    return count[0]


def stored_array(value: Any, name: str) -> jax.Array:
    """A copy of an array of any framework, as another framework trains in place.

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


def numpy(v: jax.Array) -> np.ndarray:
    """A NumPy array of its own memory, which may be written to."""
    return jax.device_get(v).copy()


def is_a(value: Any, names: Mapping[str, str]) -> str | None:
    """What `names` has for the first of the value's classes, whose package need not be here."""
    classes = (c.__name__ for c in inspect.getmro(type(value)))
    return next((names[name] for name in classes if name in names), None)


def listed(names: Collection[str]) -> str:
    """The first three names, and how many more there are."""
    first = ", ".join(itertools.islice(names, 3))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
