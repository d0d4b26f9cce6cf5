"""The multilayer perceptron."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax

from bn_jax.lab.models.dense import product
from bn_jax.lab.models.norms import Norm, hidden_layer, normalized


class MLP(nn.Module):
    """Dense layers of the given widths, each with its activation and norm, and an output.

    `MLP((100, 100, 100), 10, norm=BatchNorm, activation="sigmoid")` is the network of
    Ioffe & Szegedy 2015, section 4.1.

    Attributes:
      features: widths of the hidden layers.
      num_outputs: width of the output layer, which is linear and never normalised.
      norm: layer class or partial of one, or None.
      places: where the norm goes: any of `input`, `before` and `after` (the activation).
      activation: relu, sigmoid, tanh, elu or gelu.
      dropout: rate after every hidden layer.
    """

    features: Sequence[int] = (100, 100, 100)
    num_outputs: int = 10
    norm: Norm | None = None
    places: tuple[str, ...] = ("before",)
    activation: str = "relu"
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """x `[n, ...]`, flattened, to outputs `[n, num_outputs]`.

        Of the examples only those of the mask, bool `[n]`, count in statistics of the batch.
        """
        x = x.reshape(x.shape[0], -1)
        if "input" in self.places:
            x = normalized(self.norm, x, train, mask)
        for width in self.features:
            dense = functools.partial(nn.Dense, width, dot_general=product)
            x = hidden_layer(self.norm, self.places, dense, self.activation, x, train, mask)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_outputs)(x)
