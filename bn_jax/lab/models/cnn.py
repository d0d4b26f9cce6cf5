"""A small convolutional network."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax

from bn_jax.lab.models.convolution import Conv
from bn_jax.lab.models.norms import Norm, hidden_layer, normalized
from bn_jax.lab.models.pooling import max_pool


class CNN(nn.Module):
    """3x3 convolutions, each with its activation, norm and a 2x2 max-pool; one dense layer.

    In convolutional layers a BatchNorm's statistics are over batch and positions (Ioffe &
    Szegedy 2015, section 3.2).

    Attributes:
      features: channels of the convolutions, and last the width of the dense layer.
      num_outputs, norm, places, activation: as in `MLP`.
      dropout: rate after the dense layer.
    """

    features: Sequence[int] = (16, 32, 64)
    num_outputs: int = 10
    norm: Norm | None = None
    places: tuple[str, ...] = ("before",)
    activation: str = "relu"
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Images `[n, height, width, channels]` to outputs `[n, num_outputs]`.

        The mask is as in `MLP`.

        Raises:
          ValueError: x is of another rank, or the images are too small for the max-pools.
        """
        smallest = 2 ** (len(self.features) - 1)
        if x.ndim != 4 or min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"a CNN with {len(self.features) - 1} max-pools takes images of at least "
                f"{smallest} x {smallest}, not inputs of shape {x.shape[1:]}"
            )
        hidden = functools.partial(hidden_layer, self.norm, self.places)
        if "input" in self.places:
            x = normalized(self.norm, x, train, mask)
        *channels, width = self.features
        for c in channels:
            x = hidden(functools.partial(Conv, c, (3, 3)), self.activation, x, train, mask)
            x = max_pool(x, 2, 2, "VALID")
        x = x.reshape(x.shape[0], -1)
        x = hidden(functools.partial(nn.Dense, width), self.activation, x, train, mask)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_outputs)(x)
