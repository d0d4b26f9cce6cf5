"""Residual networks (He et al. 2015, "Deep Residual Learning for Image Recognition")."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.lab.models.convolution import Conv
from bn_jax.lab.models.images import check_images
from bn_jax.lab.models.norms import ACTIVATIONS, Norm, normalized, with_fields
from bn_jax.lab.models.pooling import max_pool

# He et al. 2015, "Delving Deep into Rectifiers", for the backward pass.
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Goyal et al. 2017, section 5.1.
OUTPUT_INIT = nn.initializers.normal(0.01)


class ResNetBlock(nn.Module):
    """Convolutions beside a shortcut: act(x + F(x)), where F ends in a norm.

    F is 3x3, 3x3; with a bottleneck 1x1, 3x3, 1x1, of which the last has 4 times the
    channels. The first 3x3 has the stride. Where the shapes differ the shortcut is a 1x1
    convolution with that stride, and a norm.

    Attributes:
      features: channels of the first convolution.
      bottleneck, norm, activation, zero_init_last, dtype: as in `ResNet`.
      stride: of height and width.
    """

    features: int
    stride: int = 1
    bottleneck: bool = False
    norm: Norm | None = None
    activation: str = "relu"
    zero_init_last: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """`[n, height, width, channels]` to `[n, height/stride, width/stride, channels']`."""
        conv = functools.partial(_convolution, self, train, mask)
        act = ACTIVATIONS[self.activation]
        last = nn.initializers.zeros if self.zero_init_last else None
        if self.bottleneck:
            channels, size = 4 * self.features, 1
            y = act(conv(self.features, 3, act(conv(self.features, 1, x)), self.stride))
        else:
            channels, size = self.features, 3
            y = act(conv(self.features, 3, x, self.stride))
        y = conv(channels, size, y, scale_init=last)
        if x.shape != y.shape:
            x = conv(channels, 1, x, self.stride)
        return act(x + y)


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over all positions, a linear layer.

    The stride of a stage is in the 3x3 convolution of its first block, as in torchvision (the
    paper has it in the 1x1 before that); kernels have a variance of 2 / fan-out. The default
    is the network of `ResNet18`.

    Attributes:
      num_outputs: width of the output layer, which is linear and never normalised.
      norm: layer class or partial of one, or None; after every convolution.
      activation: relu, sigmoid, tanh, elu or gelu.
      blocks: how many there are in each stage, whose channels double and whose height and
        width halve from one to the next.
      bottleneck: whether the blocks have three convolutions, or two.
      width: factor on the numbers of channels (64 in the first stage), which are then
        rounded to multiples of 4.
      stem: `imagenet`: a 7x7 convolution and a pooling, which leave a quarter of height and
        width; `small`: a 3x3 convolution, which leaves all of it.
      zero_init_last: start the scale of the last norm of each block at 0, so that blocks
        start as their shortcuts (Goyal et al. 2017, section 5.1). Norms without a
        `scale_init` are left alone.
      dtype: of convolutions and, where they have a `dtype`, norms: bfloat16 for half
        precision. Parameters, statistics, the mean over positions and the output layer stay
        float32.
    """

    num_outputs: int = 1000
    norm: Norm | None = None
    activation: str = "relu"
    blocks: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False
    width: float = 1.0
    stem: str = "imagenet"
    zero_init_last: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Images `[n, height, width, channels]` to outputs `[n, num_outputs]`.

        The mask is as in `MLP`.

        Raises:
          ValueError: x is of another rank, or an unknown stem.
        """
        check_images(x, self.stem)
        x = self._stem(functools.partial(_convolution, self, train, mask), x)
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                x = ResNetBlock(
                    self._channels(stage), 2 if stage and not i else 1, self.bottleneck,
                    self.norm, self.activation, self.zero_init_last, self.dtype,
                    name=f"stage_{stage + 1}_block_{i + 1}",
                )(x, train=train, mask=mask)  # fmt: skip
        x = x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(self.num_outputs, kernel_init=OUTPUT_INIT)(x)

    @nn.nowrap
    def _stem(self, conv, x):
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = ACTIVATIONS[self.activation](conv(self._channels(0), size, x, stride))
        if self.stem == "small":
            return x
        # A border of 1 on every side: "SAME" has none before an even height.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
        return max_pool(x, 3, 2, "VALID")

    @nn.nowrap
    def _channels(self, stage):
        return 4 * max(1, round(64 * 2**stage * self.width / 4))


class ResNet18(ResNet):
    """ResNet-18: with `norm=BatchNorm` and images of 3 channels 11,689,512 parameters.

    There are 9,600 running statistics beside these; without a norm 11,684,712 parameters.
    """


class ResNet50(ResNet):
    """ResNet-50: with `norm=BatchNorm` and images of 3 channels 25,557,032 parameters.

    There are 53,120 running statistics beside these; without a norm 25,530,472 parameters.
    """

    blocks: Sequence[int] = (3, 4, 6, 3)
    bottleneck: bool = True


def _convolution(module, train, mask, features, size, x, stride=1, scale_init=None):
    """A convolution of `module` and its norm; without one, the convolution has a bias."""
    x = Conv(
        features, (size, size), strides=stride, padding=size // 2, dtype=module.dtype,
        use_bias=module.norm is None, kernel_init=KERNEL_INIT,
    )(x)  # fmt: skip
    norm = with_fields(module.norm, dtype=module.dtype, scale_init=scale_init)
    return normalized(norm, x, train, mask)
