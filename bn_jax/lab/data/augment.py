"""Changes to training images, on the device, as pure functions of a key.

Each takes images `[n, height, width, channels]` as a network sees them, and changes every
one of them in a way of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]

SHIFT = 0.1  # of height and width
CONTRAST = 0.3  # and brightness, in standard deviations of the image


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image, left to right, with probability one half."""
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image by whole pixels, up to 10 % of height and width; edges are repeated."""
    n, *size, _ = images.shape
    most = [round(SHIFT * s) for s in size]
    padded = jnp.pad(images, ((0, 0), *((m, m) for m in most), (0, 0)), mode="edge")
    starts = jax.random.randint(key, (n, 2), 0, 2 * jnp.array([most]) + 1)
    cut = jax.vmap(lambda image, at: lax.dynamic_slice(image, (*at, 0), images.shape[1:]))
    return cut(padded, starts)


def distort(key: jax.Array, images: jax.Array) -> jax.Array:
    """Changes each image's contrast and brightness: (x - m) c + m + b.

    m is the image's mean, c uniform in 1 +- .3, b uniform in +- .3 standard deviations.
    """
    n, axes = images.shape[0], (1, 2, 3)
    mean = images.mean(axes, keepdims=True)
    std = images.std(axes, keepdims=True)
    contrast, brightness = jax.random.uniform(
        key, (2, n, 1, 1, 1), minval=-CONTRAST, maxval=CONTRAST
    )
    return (images - mean) * (1 + contrast) + mean + brightness * std


AUGMENTATIONS: dict[str, Augmentation] = {"shift": shift, "flip": flip, "distort": distort}


def augmentation(names: Sequence[str]) -> Augmentation | None:
    """Those of the names, one after another; None for none.

    What comes back raises a ValueError for inputs that are no images.
    """
    if not names:
        return None

    def apply(key, images):
        if images.ndim != 4:
            raise ValueError(f"augmentation is for images, not inputs of shape {images.shape}")
        for name, part in zip(names, jax.random.split(key, len(names)), strict=True):
            images = AUGMENTATIONS[name](part, images)
        return images

    return apply
