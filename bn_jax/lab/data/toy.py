"""Datasets that need no download: scikit-learn's."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np

from bn_jax.lab.data.arrays import Arrays
from bn_jax.lab.data.cache import cached


def circles(cache_dir: Path) -> Arrays:
    """Two noisy concentric circles: 500 points to train, 500 to test, 2 classes."""
    return _kept("circles", cache_dir, _make_circles)


def digits(cache_dir: Path) -> Arrays:
    """1,797 handwritten digits of 8 x 8 pixels, 0 to 16 (UCI optdigits): 1,347 and 450.

    The split is ours, fixed and stratified: scikit-learn's copy has none.
    """
    return _kept("digits", cache_dir, _split_digits)


def _kept(name, cache_dir, make):
    """What `make` returns, kept where that can be written.

    A process that has it there starts .6 s sooner, which is what importing scikit-learn takes.
    """
    version = importlib.metadata.version("scikit-learn")
    try:
        return cached(name, f"scikit-learn {version}", cache_dir, make)
    except OSError:
        return make()


def _make_circles():
    from sklearn.datasets import make_circles

    points, labels = make_circles(1000, noise=0.1, random_state=1)
    points = np.asarray(points, np.float32)
    return Arrays.create(points[:500], labels[:500], points[500:], labels[500:], 2)


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
