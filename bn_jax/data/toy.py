"""Datasets that need no download: scikit-learn's."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np

from bn_jax.data.arrays import Arrays
from bn_jax.data.cache import cached


def circles(_: Path) -> Arrays:
    """Two noisy concentric circles: 500 points to train, 500 to test, 2 classes.

    `sklearn.datasets.make_circles(1000, noise=0.1, random_state=1)` to the bit, without the
    0.8 s that importing it takes of a comparison of 18.
    """
    rng = np.random.RandomState(1)
    angles = np.linspace(0, 2 * np.pi, 500, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    order = rng.permutation(1000)
    points = np.concatenate([circle, 0.8 * circle])[order] + rng.normal(0, 0.1, (1000, 2))
    points, labels = points.astype(np.float32), np.repeat([0, 1], 500)[order]
    return Arrays.create(points[:500], labels[:500], points[500:], labels[500:], 2)


def digits(cache_dir: Path) -> Arrays:
    """1,797 handwritten digits of 8 x 8 pixels, 0 to 16 (UCI optdigits): 1,347 and 450.

    The split is ours, fixed and stratified: scikit-learn's copy has none. They are kept in
    `cache_dir` where that can be written: a process that has them there starts .6 s sooner,
    which is what importing scikit-learn takes.
    """
    version = importlib.metadata.version("scikit-learn")
    try:
        return cached("digits", f"scikit-learn {version}", cache_dir, _split_digits)
    except OSError:
        return _split_digits()


def _split_digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=450, stratify=labels, random_state=0
    )
    return Arrays.create(train, train_labels, test, test_labels, 10)


TOYS = {"circles": circles, "digits": digits}
