"""`load`: sizes, splits and scaling; of the real sets what is known of them."""

import os
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits, make_circles

from bn_jax.errors import UserError
from bn_jax.lab.data import dataset as dataset_module
from bn_jax.lab.data import load, toy
from bn_jax.lab.data.arrays import Arrays

SIZES = {"digits": (1078, 269, 450), "circles": (400, 100, 500)}
CLASSES = {"digits": 10, "circles": 2}


@pytest.fixture(params=SIZES)
def name(request):
    return request.param


@pytest.fixture
def stand_in(monkeypatch):
    """`stand_in(inputs)` makes `load("stand-in")` train on these inputs."""

    def install(inputs):
        labels = np.arange(len(inputs)) % 2
        arrays = Arrays.create(inputs, labels, inputs[:4], labels[:4], 2)
        monkeypatch.setitem(dataset_module.TOYS, "stand-in", lambda cache_dir: arrays)

    return install


def splits(dataset):
    return dataset.train, dataset.validation, dataset.test


def rows(*some_splits):
    """How often each pair of input and label occurs."""
    return Counter(
        (np.asarray(x).tobytes(), int(y))
        for split in some_splits
        for x, y in zip(np.asarray(split.inputs), np.asarray(split.labels), strict=True)
    )


def trained_on(dataset):
    """Training and validation inputs as the network sees them."""
    parts = (dataset.train.inputs, dataset.validation.inputs)
    return np.concatenate([np.asarray(dataset.scaled(x), np.float64) for x in parts])


def test_sizes_and_types(name):
    dataset = load(name)
    assert tuple(len(s.labels) for s in splits(dataset)) == SIZES[name]
    for split in splits(dataset):
        assert split.inputs.shape[1:] == {"digits": (8, 8, 1), "circles": (2,)}[name]
        assert split.inputs.dtype == {"digits": jnp.uint8, "circles": jnp.float32}[name]
        assert split.labels.dtype == jnp.int32
        assert set(np.asarray(split.labels)) == set(range(CLASSES[name]))
        assert dataset.scaled(split.inputs).shape == split.inputs.shape
        assert dataset.scaled(split.inputs).dtype == jnp.float32
    assert dataset.num_classes == CLASSES[name]


def test_the_splits_of_digits_are_a_partition_of_scikit_learns():
    dataset = load("digits")
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 8, 8, 1)
    whole = Counter((x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True))
    assert rows(*splits(dataset)) == whole


def test_digits_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    first = load("digits", cache_dir=tmp_path)
    monkeypatch.setattr(toy, "_split_digits", None)
    jax.tree.map(np.testing.assert_array_equal, first, load("digits", cache_dir=tmp_path))


def test_circles_are_scikit_learns():
    dataset = load("circles")
    points, labels = make_circles(1000, noise=0.1, random_state=1)
    points = points.astype(np.float32)
    np.testing.assert_array_equal(dataset.test.inputs, points[500:])
    np.testing.assert_array_equal(dataset.test.labels, labels[500:])
    first = Counter((x.tobytes(), int(y)) for x, y in zip(points, labels, strict=True))
    assert rows(*splits(dataset)) == first


def test_the_split_is_always_the_same(name):
    first = load(name)
    np.random.seed(3)
    for a, b in zip(splits(first), splits(load(name)), strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_the_validation_fraction(name, fraction):
    dataset = load(name, validation_fraction=fraction)
    n = sum(SIZES[name][:2])
    assert len(dataset.validation.labels) == round(n * fraction)
    assert len(dataset.train.labels) == n - round(n * fraction)
    assert rows(dataset.train, dataset.validation) == rows(*splits(load(name))[:2])


def test_nothing_held_out(name):
    dataset = load(name, validation_fraction=0)
    assert rows(dataset.train) == rows(*splits(load(name))[:2])
    assert dataset.validation is dataset.train


@pytest.mark.parametrize("fraction", [1, -0.1, 1.5, float("nan"), float("inf")])
def test_fractions_outside_of_0_to_1_are_refused(fraction):
    with pytest.raises(UserError, match=f"validation_fraction {fraction}"):
        load("digits", validation_fraction=fraction)


def test_standard_scaling(name):
    inputs = trained_on(load(name))
    axes = tuple(range(inputs.ndim - 1))
    np.testing.assert_allclose(inputs.mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose(inputs.std(axes), 1, rtol=1e-6)


def test_unit_scaling(name):
    inputs = trained_on(load(name, scaling="unit"))
    assert np.abs(inputs).max() == pytest.approx(1, rel=1e-6)


def test_channels_are_scaled_each_by_itself(stand_in):
    noise = np.random.default_rng(0).normal(size=(50, 4, 4, 3))
    stand_in((noise * [1, 100, 1e-3] + [5, -1e3, 0]).astype(np.float32))
    inputs = trained_on(load("stand-in"))
    np.testing.assert_allclose(inputs.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std((0, 1, 2)), 1, rtol=1e-5)


def test_a_constant_channel_becomes_0(stand_in):
    inputs = np.random.default_rng(0).integers(0, 256, (20, 3, 3, 2)).astype(np.uint8)
    inputs[..., 1] = 7
    stand_in(inputs)
    assert (trained_on(load("stand-in"))[..., 1] == 0).all()


def test_the_largest_magnitude_may_be_negative(stand_in):
    stand_in(np.linspace(-8, 2, 40, dtype=np.float32).reshape(20, 2))
    assert trained_on(load("stand-in", scaling="unit")).min() == -1


@pytest.fixture
def real(tmp_path):
    """`real("mnist/3.0.1")`: the set in the folder TFDS_DATA_DIR, or the test is skipped."""

    def read(path):
        folder = os.environ.get("TFDS_DATA_DIR")
        if not folder or not Path(folder, path).is_dir():
            pytest.skip(f"TFDS_DATA_DIR does not hold {path}")
        return load(path.split("/")[0], cache_dir=str(tmp_path))

    return read


@pytest.mark.long
def test_mnist(real):
    dataset = real("mnist/3.0.1")
    assert [s.inputs.shape for s in splits(dataset)] == [
        (48_000, 28, 28, 1), (12_000, 28, 28, 1), (10_000, 28, 28, 1),
    ]  # fmt: skip
    assert dataset.train.inputs.dtype == jnp.uint8
    # The sum and the sum of squares of its training pixels are enough to know MNIST by.
    pixels = np.concatenate([dataset.train.inputs, dataset.validation.inputs])
    assert pixels.mean(dtype=np.float64) == pytest.approx(33.318421449829934, rel=1e-12)
    assert pixels.std(dtype=np.float64) == pytest.approx(78.56748998339798, rel=1e-12)
    assert dataset.offset.item() == pytest.approx(33.318421, rel=1e-6)
    assert 1 / dataset.factor.item() == pytest.approx(78.567490, rel=1e-6)
    labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
    per_class = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(labels).tolist() == per_class
    per_class = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(np.asarray(dataset.test.labels)).tolist() == per_class


@pytest.mark.long
def test_cifar10(real):
    dataset = real("cifar10/3.0.2")
    assert [s.inputs.shape for s in splits(dataset)] == [
        (40_000, 32, 32, 3), (10_000, 32, 32, 3), (10_000, 32, 32, 3),
    ]  # fmt: skip
    assert dataset.train.inputs.dtype == jnp.uint8
    # Its files may be sorted by class: a validation set off one end would lack most.
    for split, expected in zip(splits(dataset), (4000, 1000, 1000), strict=True):
        counts = np.bincount(np.asarray(split.labels), minlength=10)
        np.testing.assert_allclose(counts, expected, rtol=0.1)
    mean, std = dataset.offset.ravel(), 1 / dataset.factor.ravel()
    np.testing.assert_allclose(mean, [125.3, 123.0, 113.9], atol=0.3)
    np.testing.assert_allclose(std, [63.0, 62.1, 66.7], atol=0.5)
