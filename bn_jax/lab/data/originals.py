"""MNIST, Fashion-MNIST and CIFAR from the files that their authors distribute.

They are IDX files, packed by gzip or not (LeCun, Cortes & Burges 1998; Xiao et al. 2017), and
the binary and the Python version of CIFAR (Krizhevsky 2009), unpacked.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bn_jax.errors import UserError
from bn_jax.lab.data.arrays import Arrays
from bn_jax.lab.data.cache import crc32

Images = tuple[np.ndarray, np.ndarray]
# What reading a damaged file raises.
DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    OSError,
    zlib.error,
    pickle.UnpicklingError,
)


class Layout(NamedTuple):
    """The files of a set in one format.

    Attributes:
      train, test: names of the files of each split.
      read: from the contents of a split's files to its images and labels.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    read: Callable[[list[bytes]], Images]


class Files(NamedTuple):
    """The files of a set that were found."""

    train: list[Path]
    test: list[Path]
    layout: Layout
    classes: int

    def fingerprint(self) -> str:
        """Returns text that changes when a file does."""
        return "\n".join(f"{path.name} {crc32(path)}" for path in (*self.train, *self.test))

    def read(self) -> Arrays:
        """Returns the images `[n, height, width, channels]` and labels of both splits.

        Raises:
          UserError: a file is damaged.
        """
        parts = (self._split(self.train), self._split(self.test))
        return Arrays.create(*parts[0], *parts[1], self.classes)

    def _split(self, paths: list[Path]) -> Images:
        try:
            images, labels = self.layout.read([_unpacked(path) for path in paths])
            if len(images) != len(labels) or not len(labels) or labels.max() >= self.classes:
                raise ValueError(f"{len(images)} images, {len(labels)} labels")
        except DAMAGE as e:
            names = ", ".join(path.name for path in paths)
            raise UserError(
                f"{paths[0].parent}: {names} cannot be read ({e}): download them again"
            ) from e
        return images, labels


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def find(name: str, data_dir: Path) -> Files | None:
    """Looks for the authors' files in the folders of a set's name in `data_dir`, then there."""
    folders, layouts, classes = SETS.get(name, ((), (), 0))
    for folder in folders:
        for layout in layouts:
            splits = [[_existing(data_dir / folder, f) for f in s] for s in layout[:2]]
            train, test = ([path for path in split if path] for split in splits)
            if len(train) == len(layout.train) and len(test) == len(layout.test):
                return Files(train, test, layout, classes)
    return None


def _existing(folder: Path, name: str) -> Path | None:
    names = name, f"{name}.gz", name.replace("-idx", ".idx")
    return next((folder / n for n in names if (folder / n).is_file()), None)


def read_idx(contents: list[bytes]) -> Images:
    """Returns images and labels of IDX files: a magic number, the sizes, then bytes."""
    images, labels = map(_idx, contents)
    return images[..., None], labels


def _idx(content: bytes) -> np.ndarray:
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError("no IDX file of bytes")
    end = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:end], ">i4")
    if len(content) != end + math.prod(map(int, shape)):
        raise ValueError(f"{len(content)} bytes, not those of the shape {shape.tolist()}")
    return np.frombuffer(content, np.uint8, offset=end).reshape(shape)


def read_binary(contents: list[bytes], label_bytes: int = 1) -> Images:
    """Returns images and labels of CIFAR's binary version; the last label is the fine one."""
    rows = np.concatenate([np.frombuffer(c, np.uint8) for c in contents])
    rows = rows.reshape(-1, label_bytes + 3072)
    return _pixels(rows[:, label_bytes:]), rows[:, label_bytes - 1]


def read_python(contents: list[bytes], key: bytes = b"labels") -> Images:
    """Returns images and labels of CIFAR's Python version; only arrays are unpickled."""
    batches = [_Arrays(io.BytesIO(c), encoding="bytes").load() for c in contents]
    pixels = np.concatenate([np.asarray(batch[b"data"], np.uint8) for batch in batches])
    return _pixels(pixels), np.concatenate([np.asarray(batch[key]) for batch in batches])


def _pixels(rows: np.ndarray) -> np.ndarray:
    """Rows of planes, red first, as `[n, 32, 32, 3]`."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _Arrays(pickle.Unpickler):
    """An unpickler that knows arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        match module.removeprefix("numpy."), name:
            case (("core.multiarray" | "_core.multiarray"), "_reconstruct"):
                return lambda cls, shape, kind: np.empty(0, np.uint8)
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case "_codecs", "encode":
                return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")


_IDX = (
    Layout(
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        read_idx,
    ),
)
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR10 = (
    Layout(tuple(f"{b}.bin" for b in _BATCHES), ("test_batch.bin",), read_binary),
    Layout(_BATCHES, ("test_batch",), read_python),
)
_CIFAR100 = (
    Layout(("train.bin",), ("test.bin",), lambda contents: read_binary(contents, 2)),
    Layout(("train",), ("test",), lambda contents: read_python(contents, b"fine_labels")),
)
# By name: folders that may hold it (torchvision's too), formats, number of classes.
SETS: dict[str, tuple[tuple[str, ...], tuple[Layout, ...], int]] = {
    "mnist": (("mnist", "MNIST/raw", "."), _IDX, 10),
    "fashion_mnist": (
        ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "fashion", "."),
        _IDX,
        10,
    ),
    "cifar10": (("cifar-10-batches-bin", "cifar-10-batches-py", "cifar10", "."), _CIFAR10, 10),
    "cifar100": (("cifar-100-binary", "cifar-100-python", "cifar100", "."), _CIFAR100, 100),
}
