"""Two convolutional networks for CIFAR-10: a norm after, and before, the activation."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax

from bn_jax.lab.models.convolution import Conv
from bn_jax.lab.models.images import check_images
from bn_jax.lab.models.norms import Norm, hidden_layer, normalized
from bn_jax.lab.models.pooling import max_pool


class _Cifar(nn.Module):
    """What the two share: blocks of two 3x3 convolutions and a max-pool, a dense layer."""

    features: Sequence[int]
    num_outputs: int = 10
    norm: Norm | None = None
    places: tuple[str, ...] = ("before",)
    activation: str = "relu"
    dropout: float = 0.5

    def split(self, dense: int) -> tuple[Sequence[int], Sequence[int]]:
        """The features of the blocks, and those of the dense layers."""
        if len(self.features) <= dense:
            raise ValueError(
                f"features={tuple(self.features)}: name the channels of one or more blocks, "
                f"then the width of each hidden dense layer ({dense} of them)"
            )
        return self.features[:-dense], self.features[-dense:]

    def blocks(
        self,
        channels: Sequence[int],
        second: str,
        x: jax.Array,
        train: bool,
        mask: jax.Array | None,
    ) -> jax.Array:
        """x through the blocks, flattened; `second` is the second convolution's padding."""
        check_images(x)
        image = x.shape[1:]
        if "input" in self.places:
            x = normalized(self.norm, x, train, mask)
        for c in channels:
            for padding in ("SAME", second):
                conv = functools.partial(Conv, c, (3, 3), padding=padding)
                x = hidden_layer(self.norm, self.places, conv, self.activation, x, train, mask)
            if min(x.shape[1:3]) < 2:
                raise ValueError(f"images of {image} are too small for {len(channels)} blocks")
            x = max_pool(x, 2, 2, "VALID")
            x = nn.Dropout(self.dropout / 2, deterministic=not train)(x)
        return x.reshape(x.shape[0], -1)

    def dense(self, width: int, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """A dense layer with its norm and activation, and dropout."""
        layer = functools.partial(nn.Dense, width)
        x = hidden_layer(self.norm, self.places, layer, self.activation, x, train, mask)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class CifarA(_Cifar):
    """Post-activation BatchNorm: blocks of 32, 64 and 128 channels, dense 512 and 128.

    The last hidden layer has no norm. With `norm=BatchNorm`, 10 outputs and 32x32x3 images
    there are 1,404,970 parameters and 1,920 running statistics; without, 1,403,050
    parameters.

    Attributes:
      features: channels of the blocks, then the widths of the two dense layers.
      num_outputs, norm, activation: as in `MLP`.
      places: where the norm goes: any of `input`, `before` and `after` (the activation).
      dropout: rate after the first dense layer; it is half of that after a block.
    """

    features: Sequence[int] = (32, 64, 128, 512, 128)
    places: tuple[str, ...] = ("after",)

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Images `[n, height, width, channels]` to outputs `[n, num_outputs]`.

        The mask is as in `MLP`.

        Dropout takes the random stream `dropout`, in training.

        Raises:
          ValueError: x is of another rank, or the images are too small for the max-pools,
            or there are too few features.
        """
        channels, (width, last) = self.split(2)
        x = self.dense(width, self.blocks(channels, "SAME", x, train, mask), train, mask)
        layer = functools.partial(nn.Dense, last)
        x = hidden_layer(None, (), layer, self.activation, x, train, mask)
        return nn.Dense(self.num_outputs)(x)


class CifarB(_Cifar):
    """Pre-activation BatchNorm: blocks of 32 and 64 channels, a dense layer of 512.

    The second convolution of a block has no padding. With `norm=BatchNorm`, 10 outputs and
    32x32x3 images there are 1,251,562 parameters and 1,408 running statistics; without,
    1,250,858 parameters. The published network with BatchNorm has `dropout=0`.

    Attributes:
      features: channels of the blocks, then the width of the dense layer.
      others: as in `CifarA`.
    """

    features: Sequence[int] = (32, 64, 512)

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """As `CifarA`'s."""
        channels, (width,) = self.split(1)
        x = self.dense(width, self.blocks(channels, "VALID", x, train, mask), train, mask)
        return nn.Dense(self.num_outputs)(x)
