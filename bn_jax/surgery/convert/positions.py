"""The order of the features where an image becomes a vector, or a vector an image.

Flattening [C, H, W] and flattening [H, W, C] give the same features in another order: a
Dense after it has the same shape in both, and computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from bn_jax.surgery.convert.layers import Arrays, Layer

Shape = tuple[int, ...] | None
Shapes = Mapping[str, Shape]
CONVOLUTIONS = ("Conv", "ConvTranspose")
PER_FEATURE = ("BatchNorm", "LayerNorm")


def permuted(
    arrays: Arrays,
    kind: str,
    name: str,
    flattened: Shapes,
    unflattened: Shapes,
    *,
    back: bool = False,
) -> Arrays:
    """The arrays with their features in Flax's order, or (`back`) with the channels first.

    Args:
      arrays: of a layer, in Flax's layout.
      kind, name: the layer's.
      flattened: by layer, [C, *positions] that were flattened into its inputs.
      unflattened: by layer, [C, *positions] that its outputs are.

    Raises:
      ValueError: a shape that does not have the layer's number of features, or a layer
        whose features have no order.
    """
    before, after = flattened.get(name), unflattened.get(name)
    if before is None and after is None:
        return arrays
    if kind == "Dense":
        axes = {"kernel": (before, after), "bias": (after,)}
    elif kind in PER_FEATURE:
        axes = {leaf: (before or after,) for leaf in arrays if arrays[leaf].ndim}
    else:
        raise ValueError(f"{name} is a {kind}: it does not come after or before a flattening")
    turned = dict(arrays)
    for leaf in axes.keys() & arrays.keys():
        for axis, shape in enumerate(axes[leaf]):
            if shape is not None:
                turned[leaf] = _turned(turned[leaf], shape, axis, name, back)
    return turned


def _turned(v: jax.Array, shape: tuple[int, ...], axis: int, name: str, back: bool):
    if math.prod(shape) != v.shape[axis]:
        raise ValueError(
            f"{name} has {v.shape[axis]} features and the shape {tuple(shape)} has "
            f"{math.prod(shape)}: give [C, H, W] as it is where the layer flattens it"
        )
    order = jnp.moveaxis(jnp.arange(v.shape[axis]).reshape(shape), 0, -1).reshape(-1)
    return jnp.take(v, jnp.argsort(order) if back else order, axis)


def refuse_unsaid(
    pairs: list[tuple[Layer, Layer, str]], flattened: Shapes, unflattened: Shapes
) -> None:
    """Raises a ValueError where the order of a layer's features is neither known nor given.

    By the shapes of the Flax model's calls: after a convolution a layer takes vectors of
    another number of features, or after a Dense a layer takes images of another.

    Args:
      pairs: (foreign layer, ours, kind) in the order of first calls.
      flattened, unflattened: what the caller gives, by the foreign names.
    """
    said = flattened.keys() | unflattened.keys()
    if unknown := said - {theirs.name for theirs, _, _ in pairs}:
        raise ValueError(
            f"a shape is given for {', '.join(sorted(unknown))}, of which there is none: there "
            f"are {', '.join(theirs.name for theirs, _, _ in pairs)}"
        )
    channels, vectors, size = None, [], 0
    for theirs, ours, kind in pairs:
        features, image = ours.x[-1], len(ours.x) > 2
        if image and vectors and features != size:
            for layer in vectors:
                _refuse(layer, "unflattened", said)
        if not image and channels not in (None, features):
            _refuse(theirs, "flattened", said)
        if image:
            channels = ours.y[-1] if kind in CONVOLUTIONS or channels else None
            vectors = []
        elif kind in PER_FEATURE:
            vectors = [*vectors, theirs] if vectors else []
        else:
            channels, vectors, size = None, [theirs], ours.y[-1]


def _refuse(layer, argument, said):
    if layer.channels_first and layer.name not in said:
        raise ValueError(
            f"{layer.name}: its features are an image's, [C, H, W] there and [H, W, C] here: "
            f"give {argument}={{{layer.name!r}: (C, H, W)}}, or None in place of the shape if "
            "their order is the same in both"
        )
