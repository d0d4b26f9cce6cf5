"""Datasets as arrays on the device, and the order in which a run sees them."""

from bn_jax.lab.data.augment import AUGMENTATIONS, augmentation
from bn_jax.lab.data.batches import batch_indices, same_batch_indices
from bn_jax.lab.data.dataset import Dataset, Split, load

__all__ = [
    "AUGMENTATIONS",
    "Dataset",
    "Split",
    "augmentation",
    "batch_indices",
    "load",
    "same_batch_indices",
]
