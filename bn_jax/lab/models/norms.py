"""Which normalisation goes where: what every model here shares."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from bn_jax.linen import BatchNorm

# A layer class, or a partial of one: `functools.partial(BatchNorm, momentum=0.9)`.
Norm = Callable[..., nn.Module]

PLACES = ("input", "before", "after")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "elu": nn.elu,
    "gelu": nn.gelu,
}


class GroupNorm(nn.Module):
    """`flax.linen.GroupNorm` with gcd(num_groups, channels) groups: they divide evenly."""

    num_groups: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises each example over the groups of its last axis; x `[n, ..., channels]`."""
        return nn.GroupNorm(num_groups=math.gcd(self.num_groups, x.shape[-1]))(x)


NORMS: dict[str, Norm | None] = {
    "none": None,
    "bn": BatchNorm,
    "layer": nn.LayerNorm,
    "group": GroupNorm,
}


def normalized(
    norm: Norm | None, x: jax.Array, train: bool, mask: jax.Array | None = None
) -> jax.Array:
    """x through a new layer of `norm` (inside a compact method); x itself if it is None.

    Args:
      norm: the layer; one with running statistics is given `train` and the mask.
      x: input, channels last.
      train: whether it uses, and updates, the statistics of the batch.
      mask: bool `[n]`: examples that count in these.
    """
    if norm is None:
        return x
    layer = norm()
    if not hasattr(layer, "use_running_average"):
        return layer(x)
    if mask is not None:
        mask = mask.reshape(-1, *(1,) * (x.ndim - 1))
    return layer(x, use_running_average=not train, mask=mask)


def with_fields(norm: Norm | None, **fields: Any) -> Norm | None:
    """The norm with those of the fields that are not None and that it has."""
    if norm is None:
        return None
    known = inspect.signature(norm).parameters
    given = {k: v for k, v in fields.items() if v is not None and k in known}
    return functools.partial(norm, **given)


def hidden_layer(
    norm: Norm | None,
    places: tuple[str, ...],
    linear: Callable[..., nn.Module],
    activation: str,
    x: jax.Array,
    train: bool,
    mask: jax.Array | None = None,
) -> jax.Array:
    """A linear layer, its activation, and the norm before or after that.

    With the norm before the activation the linear layer has no bias: the norm's does the
    same (Ioffe & Szegedy 2015, section 3.2).

    Args:
      norm: the layer, or None.
      places: some of `before`, `after`; others are not for this layer.
      linear: `nn.Dense` or `nn.Conv` with its size; given use_bias and kernel_init.
      activation: a key of `ACTIVATIONS`.
      x, train, mask: as in `normalized`.
    """
    before = norm is not None and "before" in places
    x = linear(use_bias=not before, kernel_init=kernel_init(activation))(x)
    x = normalized(norm, x, train, mask) if before else x
    x = ACTIVATIONS[activation](x)
    return normalized(norm, x, train, mask) if "after" in places else x


def kernel_init(activation: str) -> nn.initializers.Initializer:
    """He et al. 2015 for the relu family, Glorot & Bengio 2010 for sigmoid and tanh."""
    he = activation in ("relu", "elu", "gelu")
    return nn.initializers.he_normal() if he else nn.initializers.xavier_normal()
