"""A dataset as four arrays in memory, or mapped from the cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Arrays(NamedTuple):
    """Inputs `[n, ...]` (uint8 or float32) and labels `[n]` (int32) of train and test.

    `mean` and `std` are those of the training inputs for each channel (the last axis),
    `peak` their largest magnitude.
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    peak: float

    @classmethod
    def create(cls, train_inputs, train_labels, test_inputs, test_labels, num_classes):
        """Measures mean, std and peak; labels become int32."""
        channels = train_inputs.reshape(-1, train_inputs.shape[-1])
        return cls(
            train_inputs,
            np.asarray(train_labels, np.int32),
            test_inputs,
            np.asarray(test_labels, np.int32),
            num_classes,
            # One channel at a time: float64 copies of CIFAR-10 would take 1.2 GB.
            tuple(float(c.mean(dtype=np.float64)) for c in channels.T),
            tuple(float(c.std(dtype=np.float64)) for c in channels.T),
            float(np.abs(channels).max()),
        )
