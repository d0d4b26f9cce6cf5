"""The order of the features where an image becomes a vector, or a vector an image.

Flattening [C, H, W] and flattening [H, W, C] give the same features in another order: a
Dense after it has the same shape in both, and computes something else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.surgery.calls import BatchNorms, spelled
from bn_jax.surgery.convert import models
from bn_jax.surgery.convert.layers import Arrays, Layer
from bn_jax.surgery.intercept import Model, apply

Shapes = Mapping[str, tuple[int, ...] | None]
CONVOLUTIONS = ("Conv", "ConvTranspose")
PER_FEATURE = ("BatchNorm", "LayerNorm")
CHANNELWISE = (*CONVOLUTIONS, "BatchNorm", "GroupNorm")  # with the channels first in torch
# A feature's number: that of its layer, from 1, times 2^FEATURES, and its own. Channels of
# images have a second field of bits for it, so that a sum of both kinds has both numbers.
FEATURES, FIELD = 20, 30
NONE = 2 * FIELD  # no number has this bit


@dataclasses.dataclass(frozen=True)
class Orders:
    """The orders of a layer's input and output features, None where they are Flax's.

    Feature i of the model that has its channels first is feature `order[i]` of Flax's.
    """

    before: np.ndarray | None = None
    after: np.ndarray | None = None


def order_of(shape: tuple[int, ...] | None) -> np.ndarray | None:
    """The order of [C, *positions] flattened."""
    if shape is None:
        return None
    places = np.arange(math.prod(shape)).reshape(*shape[1:], shape[0])
    return np.moveaxis(places, -1, 0).reshape(-1)


def permuted(arrays: Arrays, kind: str, name: str, orders: Orders, back: bool) -> Arrays:
    """A layer's arrays with the features in Flax's order, or (`back`) with the channels first.

    Raises:
      ValueError: an order that does not have the layer's number of features, or a layer
        whose features have none.
    """
    before, after = orders.before, orders.after
    if before is None and after is None:
        return arrays
    if kind not in ("Dense", *PER_FEATURE):
        raise ValueError(f"{name} is a {kind}: it does not come after or before a flattening")
    turned = dict(arrays)
    for leaf in (n for n, v in arrays.items() if v.ndim):
        one = before if after is None and kind != "Dense" else after
        for axis, order in enumerate((before, after) if leaf == "kernel" else (one,)):
            if order is None:
                continue
            features = arrays[leaf].shape[axis]
            if len(order) != features:
                raise ValueError(
                    f"{name} has {features} features and the shape that is given has "
                    f"{len(order)}: give [C, H, W] as it is where the layer flattens it"
                )
            turned[leaf] = jnp.take(turned[leaf], order if back else np.argsort(order), axis)
    return turned


def derived(
    layers: list[Layer], model: Model, variables: Any, inputs: Any, call: Any, norms: BatchNorms
) -> dict[str, Orders]:
    """The orders of the layers that come after or before a flattening, by their names.

    They follow from the Flax model alone, if the other one has [C, *positions] wherever it
    has [*positions, C].

    Args:
      layers: what `models.read` has read; the others as for that.
    """
    images = any(layer.kind in CONVOLUTIONS for layer in layers)
    if not images and all(v.ndim < 3 for v in jax.tree.leaves(inputs)):
        return {}
    first, labels = _Labels(layers).of(model, variables, inputs, call, norms)
    rows = {n: row for n, row in labels.items() if row.ndim == 1}
    before = {n: _flattened(row, first[n]) for n, row in rows.items()}
    after = {}
    for number, layer in enumerate(layers, 1):
        for image in (v for v in labels.values() if v.ndim > 1 and layer.kind == "Dense"):
            order = _unflattened(image, number, math.prod(layer.features))
            if order is None:
                continue
            after[layer.name] = order
            own = number << FEATURES | np.arange(len(order))
            for other in layers:
                if other.name in rows and np.array_equal(rows[other.name], own):
                    (before if other.kind == "Dense" else after)[other.name] = order
    orders = {n: Orders(before.get(n), after.get(n)) for n in (*before, *after)}
    return {n: o for n, o in orders.items() if o.before is not None or o.after is not None}


def _flattened(row: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """The order of a vector that has several positions of the channels of an image."""
    channels, places = row >> FIELD, np.arange(len(row))
    seen = np.unique(np.stack([channels, values])[:, channels > 0], axis=1)
    if len(np.unique(seen[0])) == seen.shape[1]:
        return None  # one position, which may have a channel twice
    _, first, which = np.unique(channels, return_index=True, return_inverse=True)
    order = np.argsort(np.where(channels, first[which], places), kind="stable")
    return None if np.array_equal(order, places) else order


def _unflattened(image: np.ndarray, number: int, size: int) -> np.ndarray | None:
    """The order of the outputs of a Dense, by its number, if they became this image."""
    seen = np.moveaxis(image, -1, 0).reshape(-1)
    own = seen[seen >> FEATURES == number] & ((1 << FEATURES) - 1)
    order, places = own[np.sort(np.unique(own, return_index=True)[1])], np.arange(size)
    moved = not np.array_equal(order, places) and np.array_equal(np.sort(order), places)
    return order if moved else None


class _Labels:
    """The numbers of the features at each place of the layers' inputs, and of the outputs.

    Of a Dense or a norm one vector, of a convolution one image. The model is run once for
    every bit of the numbers, on random values that are larger where the bit is 1. Pooling,
    activations, sums and concatenations let the change through, whatever the weights are.
    """

    def __init__(self, layers: list[Layer]):
        self.numbered = {layer.name: (n, layer) for n, layer in enumerate(layers, 1)}
        self.first: dict[str, np.ndarray] = {}  # what the run without a bit had there
        self.labels: dict[str, Any] = defaultdict(int)
        self.bits: set[int] = set()

    def of(self, model: Model, variables: Any, inputs: Any, call: Any, norms: BatchNorms):
        """The inputs of layers in the run without a bit, and their labels."""

        @jax.jit
        def run(bit, variables):
            watched = models.watch(model, variables, functools.partial(self._hook, bit), norms)
            given = jax.tree.map(functools.partial(self._given, bit), inputs)
            outputs = apply(watched, variables, *given, **call)
            for i, y in enumerate(v for v in jax.tree.leaves(outputs) if v.ndim > 3):
                self._note(f"an output {i}", bit, y[0])

        shapes = jax.ShapeDtypeStruct
        variables = jax.tree.map(
            lambda v: jnp.ones(v.shape, v.dtype) if isinstance(v, shapes) else v, variables
        )
        run(NONE, variables)  # traces it, and so finds what bits there are
        for bit in self.bits:
            jax.effects_barrier()
            run(bit, variables)
        jax.effects_barrier()
        return self.first, self.labels

    def _hook(self, bit, one):
        y = one.proceed()
        if spelled(one.path) not in self.numbered:
            return one.x.astype(y.dtype) if one.x.shape == y.shape else y
        number, layer = self.numbered[spelled(one.path)]
        kind = layer.kind
        if kind == "Dense":
            size = layer.stored["kernel"].size // math.prod(layer.features)
            self._note(layer.name, bit, one.x.reshape(-1, size)[0])
            image = y.ndim - len(layer.features) > 2  # as a convolution of one position
            return self._marked(bit, number, image, layer.features, y)
        # An image, perhaps of a Dense's features; or a vector, perhaps of an image's.
        image = kind in CHANNELWISE and one.x.ndim > 2 and any(b < FIELD for b in self.bits)
        if image or (kind in PER_FEATURE and one.x.ndim == 2):
            self._note(layer.name, bit, one.x[0])
        if kind in CONVOLUTIONS:
            return self._marked(bit, number, True, y.shape[-1:], y)
        return jnp.ones_like(y) if kind == "Embed" else one.x.astype(y.dtype)

    def _given(self, bit, v):
        if not jnp.issubdtype(v.dtype, jnp.inexact):
            return jnp.zeros_like(v) if isinstance(v, jax.ShapeDtypeStruct) else v
        shape = v.shape[-1:] if v.ndim > 2 else ()
        return self._marked(bit, len(self.numbered) + 1, True, shape, v)

    def _note(self, name, bit, x):
        def note(bit, x):
            x = np.array(x)
            if bit == NONE:
                self.first.setdefault(name, x)
            elif x.shape == self.first[name].shape:
                self.labels[name] |= (x != self.first[name]) * (1 << int(bit))

        # Callbacks are threads of their own, where x64 may be off.
        jax.debug.callback(note, bit, x.astype(jnp.float32))

    def _marked(self, bit, number, image, shape, y):
        """Values in place of y, of which those are larger whose number has the bit."""
        numbers = number << FEATURES | np.arange(math.prod(shape)).reshape(shape)
        field = FIELD if image else 0
        every = int(np.bitwise_or.reduce(numbers, axis=None))
        self.bits |= {field + i for i in range(FIELD) if every >> i & 1}
        low, more = jax.random.uniform(jax.random.key(number), (2, *y.shape), minval=0.2)
        own = (bit >= field) & (bit < field + FIELD)
        larger = jnp.where(own, jnp.asarray(numbers) >> (bit - field) % FIELD & 1, 0)
        return (0.3 * (low + jnp.broadcast_to(larger, y.shape) * more)).astype(y.dtype)
