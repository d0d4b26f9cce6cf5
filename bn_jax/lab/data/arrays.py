"""A dataset as four arrays in memory, or mapped from the cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Arrays(NamedTuple):
    """Inputs `[n, ...]` (uint8 or float32) and labels `[n]` (int32) of train and test.

    `num_classes` is 0, and the labels are float32 `[n]` or `[n, k]`, where numbers are to
    be predicted. `mean` and `std` are those of the training inputs for each channel (the last
    axis), `peak` their largest magnitude. `validation` has inputs and labels of data that
    brings such a split. `note` says what was done to the data.
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    peak: float
    validation: tuple[np.ndarray, np.ndarray] | None = None
    note: str = ""

    @classmethod
    def create(cls, train_inputs, train_labels, test_inputs, test_labels, num_classes):
        """Measures mean, std and peak, and converts the labels."""
        channels = train_inputs.reshape(-1, train_inputs.shape[-1])
        return cls(
            train_inputs,
            _labels(train_labels, num_classes),
            test_inputs,
            _labels(test_labels, num_classes),
            num_classes,
            # One channel at a time: float64 copies of CIFAR-10 would take 1.2 GB.
            tuple(float(c.mean(dtype=np.float64)) for c in channels.T),
            tuple(float(c.std(dtype=np.float64)) for c in channels.T),
            float(np.abs(channels).max()),
        )


def _labels(labels, num_classes):
    return np.asarray(labels, np.int32 if num_classes else np.float32)
