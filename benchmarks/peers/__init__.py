"""One training task in bn_jax, a plain Flax loop, torch and Keras, each in its own process.

A side is a function from a `Task` to its programs: `step` trains on one batch that is where
the computation is; `epoch` trains on all images once, from bytes in memory. Each ends when the
numbers are there. `parameters` counts those of the network.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CLASSES = 10
SHIFT = 3  # pixels of 32: `bn_jax.lab.data.augment.SHIFT`


class Task(NamedTuple):
    """A network and its training, on images of noise.

    Attributes:
      network: `mlp` (sigmoids with BatchNorm before each; SGD) or `cifar_a`
        (`bn_jax.lab.models.CifarA`; Adam).
      features: as the network has them.
      image: height, width and channels.
      images: of an epoch.
      batch: images of a step.
      augment: move and mirror every image of an epoch.
    """

    network: str
    features: tuple[int, ...]
    image: tuple[int, int, int]
    images: int
    batch: int
    augment: bool = False

    @property
    def sgd(self) -> bool:
        """The optimizer is SGD, and no Adam."""
        return self.network == "mlp"

    @property
    def learning_rate(self) -> float:
        """Of the network's optimizer."""
        return 0.1 if self.sgd else 1e-3

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.images // self.batch

    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 `[images, height, width, channels]` and labels int32 `[images]`."""
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (self.images, *self.image), dtype=np.uint8)
        return pixels, rng.integers(0, CLASSES, self.images, dtype=np.int32)
