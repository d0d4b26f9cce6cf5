"""Inception with batch normalisation (Ioffe & Szegedy 2015, section 4.2 and figure 5)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.errors import UserError
from bn_jax.lab.models.convolution import Conv
from bn_jax.lab.models.images import check_images
from bn_jax.lab.models.norms import Norm, hidden_layer, normalized, with_fields
from bn_jax.lab.models.pooling import avg_pool, max_pool


class Block(NamedTuple):
    """A row of figure 5: the channels of the convolutions, the pooling and the stride.

    Attributes:
      one: of the 1x1 convolution; 0 for none.
      three_reduce, three: of a 1x1 convolution, and of the 3x3 that follows it.
      double_reduce, double: of a 1x1 convolution, and of each of the two 3x3 after it.
      pool: `avg` or `max`, over 3x3.
      projection: of the 1x1 convolution that follows the pooling; 0 for none.
      stride: of the pooling, and of the last convolutions beside it.
    """

    one: int
    three_reduce: int
    three: int
    double_reduce: int
    double: int
    pool: str
    projection: int
    stride: int = 1


# The paper prints a projection of 128 in 4c and 4d: outputs of 608 channels, not its 576.
BLOCKS = {
    "3a": Block(64, 64, 64, 64, 96, "avg", 32),
    "3b": Block(64, 64, 96, 64, 96, "avg", 64),
    "3c": Block(0, 128, 160, 64, 96, "max", 0, stride=2),
    "4a": Block(224, 64, 96, 96, 128, "avg", 128),
    "4b": Block(192, 96, 128, 96, 128, "avg", 128),
    "4c": Block(160, 128, 160, 128, 160, "avg", 96),
    "4d": Block(96, 128, 192, 160, 192, "avg", 96),
    "4e": Block(0, 128, 192, 192, 256, "max", 0, stride=2),
    "5a": Block(352, 192, 320, 160, 224, "avg", 128),
    "5b": Block(352, 192, 320, 192, 224, "max", 128),
}
LEAVES = {"imagenet": 8, "small": 2}  # a stem leaves 1 / this of height and width


class InceptionBlock(nn.Module):
    """Convolutions of several sizes and a pooling side by side, joined along the channels.

    Attributes:
      row: a `Block`.
      norm, places, activation, width, dtype: as in `Inception`.
    """

    row: Block
    norm: Norm | None = None
    places: tuple[str, ...] = ("before",)
    activation: str = "relu"
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """`[n, height, width, channels]` to `[n, height/stride, width/stride, channels]`."""
        row, conv = self.row, functools.partial(_convolution, self, train, mask)
        one = [conv(row.one, 1, x)] if row.one else []
        three = conv(row.three, 3, conv(row.three_reduce, 1, x), row.stride)
        double = conv(row.double, 3, conv(row.double_reduce, 1, x))
        double = conv(row.double, 3, double, row.stride)
        pooled = {"avg": avg_pool, "max": max_pool}[row.pool](x, 3, row.stride)
        pooled = conv(row.projection, 1, pooled) if row.projection else pooled
        return jnp.concatenate([*one, three, double, pooled], axis=-1)


class Inception(nn.Module):
    """The Inception network that the BatchNorm paper trains on ImageNet.

    With `norm=BatchNorm` and images of 3 channels there are 11,188,288 parameters and 19,904
    running statistics; without, 11,178,336 parameters. The paper's network without BatchNorm
    is `Inception(local_response_norm=True, dropout=0.4)`, both after Szegedy et al. 2014
    (GoogLeNet). For images of 32x32 on CPU: `Inception(10, norm=BatchNorm, width=0.25,
    stem="small", blocks=("3c", "4a", "4e", "5b"))`, of 287,946 parameters.

    Attributes:
      num_outputs: width of the output layer, which is linear and never normalised.
      norm: layer class or partial of one, or None.
      places: where the norm goes: any of `input`, `before` and `after` (the activations).
      activation: relu, sigmoid, tanh, elu or gelu.
      dropout: rate before the output layer.
      width: factor on the numbers of channels, which are then rounded to multiples of 4.
      stem: what precedes the blocks. `imagenet`: a separable 7x7, a 1x1 and a 3x3
        convolution and two poolings, which leave an eighth of height and width; `small`: a
        3x3 convolution, which leaves half.
      blocks: names in `BLOCKS`, each once.
      local_response_norm: across channels, in the stem.
      per_activation_last: in the last block, mean, variance, scale and bias of each channel
        at each position (section 4.2.3). The norm must have an `axis`, and all images the
        same size.
      dtype: of convolutions and, where they have a `dtype`, norms: bfloat16 for half
        precision. Parameters, statistics, the mean over positions and the output layer stay
        float32.
    """

    num_outputs: int = 1000
    norm: Norm | None = None
    places: tuple[str, ...] = ("before",)
    activation: str = "relu"
    dropout: float = 0.0
    width: float = 1.0
    stem: str = "imagenet"
    blocks: tuple[str, ...] = tuple(BLOCKS)
    local_response_norm: bool = False
    per_activation_last: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Images `[n, height, width, channels]` to outputs `[n, num_outputs]`.

        The mask is as in `MLP`.

        Dropout takes the random stream `dropout`, in training.

        Raises:
          ValueError: x is of another rank; an unknown stem or block; statistics per
            activation without a norm; images smaller than what becomes one position.
        """
        self._check(x)
        if "input" in self.places:
            x = normalized(self.norm, x, train, mask)
        stem = {"imagenet": _imagenet_stem, "small": _small_stem}[self.stem]
        x = stem(self, functools.partial(_convolution, self, train, mask), x)
        for name in self.blocks:
            last = self.per_activation_last and name == self.blocks[-1]
            norm = with_fields(self.norm, axis=(1, 2, 3)) if last else self.norm
            x = InceptionBlock(
                BLOCKS[name], norm, self.places, self.activation, self.width, self.dtype,
                name=f"block_{name}",
            )(x, train=train, mask=mask)  # fmt: skip
        x = x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_outputs)(x)

    @nn.nowrap
    def _check(self, x):
        check_images(x, self.stem)
        for name in self.blocks:
            if name not in BLOCKS:
                raise ValueError(f"no block {name!r}: choose from {', '.join(BLOCKS)}")
        height, width = x.shape[1:3]
        least = LEAVES[self.stem] * math.prod(BLOCKS[name].stride for name in self.blocks)
        if min(height, width) < least:
            raise UserError(
                f"images of {height}x{width} are too small for stem={self.stem!r} and the "
                f"blocks {','.join(self.blocks)}, whose strides want {least}x{least}: choose "
                "larger images, stem='small', or fewer of the blocks 3c and 4e"
            )
        if self.per_activation_last and self.norm is None:
            raise ValueError("per_activation_last=True needs a norm, such as BatchNorm")


def _convolution(module, train, mask, features, size, x, stride=1):
    """A convolution of `module`, scaled to its width, with its norm and activation."""
    channels = 4 * max(1, round(features * module.width / 4))
    conv = functools.partial(Conv, channels, (size, size), strides=stride, dtype=module.dtype)
    norm = with_fields(module.norm, dtype=module.dtype)
    return hidden_layer(norm, module.places, conv, module.activation, x, train, mask)


def _imagenet_stem(module, conv, x):
    # The first convolution is separable (figure 5): 8 filters of 7x7 for each channel of the
    # image, then 1x1. Local response normalisation as in GoogLeNet's figure 3.
    c = x.shape[-1]
    x = Conv(
        8 * c, (7, 7), strides=2, feature_group_count=c, use_bias=False, dtype=module.dtype
    )(x)
    x = _across_channels(module, max_pool(conv(64, 1, x), 3, 2))
    x = _across_channels(module, conv(192, 3, conv(64, 1, x)))
    return max_pool(x, 3, 2)


def _small_stem(module, conv, x):
    return _across_channels(module, conv(64, 3, x, 2))


def _across_channels(module, x):
    return local_response_norm(x) if module.local_response_norm else x


def local_response_norm(x: jax.Array) -> jax.Array:
    """x / (2 + 1e-4 s)^0.75, with s the sum of x^2 over 5 neighbouring channels.

    Of x's shape, channels last; there are no neighbours beyond the ends (Krizhevsky et al.
    2012, section 3.3).
    """
    window = (1,) * (x.ndim - 1) + (5,)
    s = jax.lax.reduce_window(x * x, 0.0, jax.lax.add, window, (1,) * x.ndim, "SAME")
    return x / (2 + 1e-4 * s) ** 0.75
