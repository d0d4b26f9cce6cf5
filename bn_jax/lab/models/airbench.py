"""The network of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU").

arXiv:2404.00498. The paper's BatchNorm is
`BatchNorm(momentum=0.6, epsilon=1e-12, use_scale=False, unbiased=True)`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from bn_jax.lab.models.convolution import Conv
from bn_jax.lab.models.images import check_images
from bn_jax.lab.models.norms import ACTIVATIONS, Norm, normalized, with_fields
from bn_jax.lab.models.pooling import max_pool

# What torch draws weights from: uniform in +-1 / sqrt(inputs of a unit).
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
OUTPUT_FACTOR = 1 / 9
# How much of the outputs each view of an image decides, by their number.
VIEWS = {1: (1.0,), 2: (0.5, 0.5), 6: (0.25, 0.125, 0.125, 0.25, 0.125, 0.125)}


def whitening_kernel(images: jax.Array, epsilon: float = 5e-4) -> jax.Array:
    """2x2 filters whose outputs on patches of the images are uncorrelated, of variance 1.

    Filters are v / sqrt(l + epsilon) and their negatives, for each eigenvector v of E[p p^T]
    over all patches p, and its eigenvalue l, the largest first.

    Args:
      images: float `[n, height, width, channels]`, as the network sees them.
      epsilon: keeps the filters of small eigenvalues small.

    Returns:
      A kernel `[2, 2, channels, 8 * channels]`.
    """
    parts = [images[:, i : i - 1 or None, j : j - 1 or None] for i in (0, 1) for j in (0, 1)]
    channels = images.shape[-1]
    patches = jnp.concatenate(parts, -1).reshape(-1, 4 * channels)
    second = jnp.matmul(patches.T, patches, precision="highest") / patches.shape[0]
    values, vectors = jnp.linalg.eigh(second)
    filters = (vectors / jnp.sqrt(values + epsilon)[None])[:, ::-1]
    return jnp.concatenate([filters, -filters], -1).reshape(2, 2, channels, 8 * channels)


def partial_identity(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32):
    """A kernel `[height, width, in, out]` whose first filters hand on one channel each.

    There are min(in, out) of those; the others are drawn as torch does.
    """
    height, width, *channels = shape
    first = jnp.arange(min(channels))
    kernel = UNIFORM(key, shape, dtype).at[..., first].set(0)
    return kernel.at[height // 2, width // 2, first, first].set(1)


class Whitening(nn.Module):
    """A 2x2 convolution without padding: its kernel is given, its bias is trained.

    Attributes:
      kernel: `[2, 2, channels, features]`; None: 8 features for each channel, trained.
      dtype: of the result; by default what input and kernel promote to.
    """

    kernel: Any = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` to `[n, height - 1, width - 1, features]`."""
        shape, kernel = (2, 2, x.shape[-1], 8 * x.shape[-1]), self.kernel
        kernel = self.param("kernel", UNIFORM, shape) if kernel is None else kernel
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        names = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=names)
        return y + bias.reshape(1, 1, 1, -1)


class Airbench(nn.Module):
    """Whitening, blocks of [conv, max-pool, norm, GELU, conv, norm, GELU], max-pool, dense.

    Convolutions are 3x3, without bias where there is a norm, and begin as `partial_identity`.
    The last max-pool is over all that is left (3x3 of images of 32x32); the dense layer has
    no bias, and its outputs are divided by 9. GELU is by its tanh approximation, and where
    several positions hold a maximum they share the gradient, otherwise than in the source.
    With the paper's norm, its whitening, 10 outputs and 32x32x3 images there are 1,971,352
    parameters and 2,304 running statistics.

    Attributes:
      num_outputs, norm: as in `MLP`.
      features: channels of the blocks.
      activation: a key of `ACTIVATIONS`.
      whitening: kernel of the first layer, which is then not trained; as in `Whitening`.
      views: how often each image is seen with `train=False`, the outputs being averaged: 1,
        as it is; 2, mirrored too; 6, both also moved by a pixel, up and to the left or down
        and to the right, with edges reflected, which two together count as one unmoved.
      dtype: of the activations; parameters, statistics and outputs are float32.
    """

    num_outputs: int = 10
    features: Sequence[int] = (64, 256, 256)
    norm: Norm | None = None
    activation: str = "gelu"
    whitening: Any = None
    views: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Images `[n, height, width, channels]` to outputs `[n, num_outputs]`, float32.

        The mask is as in `MLP`.

        Raises:
          ValueError: x is of another rank, or the images are too small for the max-pools.
        """
        check_images(x)
        if (min(x.shape[1:3]) - 1) >> len(self.features) < 1:
            raise ValueError(
                f"images of {x.shape[1:]} are too small for {len(self.features)} blocks"
            )
        weights = jnp.array(VIEWS[1 if train else self.views]).reshape(-1, 1, 1)
        y = self._outputs(_views(x, len(weights)), train, mask)
        return (weights * y.reshape(len(weights), len(x), -1)).sum(0)

    @nn.nowrap
    def _outputs(self, x, train, mask):
        act, norm = ACTIVATIONS[self.activation], with_fields(self.norm, dtype=self.dtype)
        conv = functools.partial(
            Conv, kernel_size=(3, 3), use_bias=norm is None, dtype=self.dtype,
            kernel_init=partial_identity,
        )  # fmt: skip
        x = act(Whitening(self.whitening, self.dtype)(x))
        for channels in self.features:
            x = max_pool(conv(channels)(x), 2, 2, "VALID")
            x = act(normalized(norm, x, train, mask))
            x = act(normalized(norm, conv(channels)(x), train, mask))
        dense = nn.Dense(
            self.num_outputs, use_bias=False, dtype=self.dtype, kernel_init=UNIFORM
        )
        return dense(x.max((1, 2))).astype(jnp.float32) * OUTPUT_FACTOR


def _views(x, count):
    """`[count * n, ...]`: view by view, in the order of `VIEWS`."""
    shown = [x]
    if count == 6:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        shown += [padded[:, :-2, :-2], padded[:, 2:, 2:]]
    if count > 1:
        shown += [v[:, :, ::-1] for v in shown]
    return jnp.concatenate(shown)
