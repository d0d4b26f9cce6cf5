"""Files in the formats of MNIST and CIFAR, written by hand from their descriptions."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest

from bn_jax.errors import UserError
from bn_jax.lab.data import originals

RNG = np.random.default_rng(0)
LABELS = {"train": np.arange(20, dtype=np.uint8) % 10, "test": np.arange(7, dtype=np.uint8)}


def idx(array):
    sizes = b"".join(struct.pack(">I", n) for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def images(count, *shape):
    return RNG.integers(0, 256, (count, *shape), np.uint8)


def planes(pixels):
    """CIFAR's order: all red bytes of an image, then all green, then all blue."""
    return np.stack(
        [pixels[:, i, j, c] for c in range(3) for i in range(32) for j in range(32)], 1
    )


def write_mnist(folder, packed=False):
    folder.mkdir(parents=True)
    written = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        written[split] = images(len(LABELS[split]), 28, 28)
        for kind, array in (("images-idx3", written[split]), ("labels-idx1", LABELS[split])):
            content = gzip.compress(idx(array)) if packed else idx(array)
            (folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}").write_bytes(content)
    return {split: pixels[..., None] for split, pixels in written.items()}


def write_cifar(folder, version, classes):
    folder.mkdir(parents=True)
    written = {split: images(len(labels), 32, 32, 3) for split, labels in LABELS.items()}
    files = {"train": np.arange(20), "test": np.arange(7)}
    names = {"train": [("train", files["train"])], "test": [("test", files["test"])]}
    if classes == 10:
        parts = np.split(np.arange(20), 5)
        names["train"] = [(f"data_batch_{i + 1}", rows) for i, rows in enumerate(parts)]
        names["test"] = [("test_batch", files["test"])]
    for split, some in names.items():
        for name, rows in some:
            pixels, labels = planes(written[split][rows]), LABELS[split][rows]
            if version == "bin":
                coarse = [np.full_like(labels, 3)] if classes == 100 else []
                content = np.column_stack([*coarse, labels, pixels]).tobytes()
                (folder / f"{name}.bin").write_bytes(content)
            else:
                key = b"fine_labels" if classes == 100 else b"labels"
                batch = {b"data": pixels, key: labels.tolist(), b"filenames": [b"a.png"]}
                (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return written


def assert_read(arrays, written):
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(arrays, f"{split}_inputs"), written[split])
        np.testing.assert_array_equal(getattr(arrays, f"{split}_labels"), LABELS[split])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion_mnist", "fashion_mnist")],
)
def test_idx(tmp_path, name, folder, packed):
    written = write_mnist(tmp_path / "data" / folder, packed)
    files = originals.find(name, tmp_path / "data")
    assert_read(files.read(), written)
    before, path = files.fingerprint(), files.test[1]
    path.write_bytes(path.read_bytes() + b"\0")
    assert files.fingerprint() != before


@pytest.mark.parametrize("version", ["bin", "python"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, version, classes):
    written = write_cifar(tmp_path / f"cifar{classes}", version, classes)
    arrays = originals.find(f"cifar{classes}", tmp_path).read()
    assert arrays.num_classes == classes
    assert_read(arrays, written)


def test_nothing_is_found_of_another_set_or_of_half_of_one(tmp_path):
    write_cifar(tmp_path / "cifar10", "bin", 10)
    assert originals.find("mnist", tmp_path) is None
    assert originals.find("imagenet", tmp_path) is None
    (tmp_path / "cifar10" / "data_batch_3.bin").unlink()
    assert originals.find("cifar10", tmp_path) is None


def test_what_a_pickle_holds_besides_arrays_is_not_called(tmp_path):
    write_cifar(tmp_path / "cifar10", "python", 10)

    class Mean:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "cifar10" / "test_batch").write_bytes(pickle.dumps({b"data": Mean()}))
    with pytest.raises(UserError, match=r"mkdir.*no array"):
        originals.find("cifar10", tmp_path).read()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", idx(LABELS["test"])[:-1], idx(np.full(7, 11, np.uint8)), b"\x1f\x8b12"],
)
def test_damaged_files_are_named(tmp_path, content):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte cannot be read"):
        originals.find("mnist", tmp_path).read()
