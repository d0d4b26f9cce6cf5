"""Data that a user brings: arrays, an `.npz` file, or a function that returns arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bn_jax.errors import UserError
from bn_jax.lab.data.arrays import Arrays

WANTED = "x_train, y_train, x_test, y_test (and x_validation, y_validation, if they exist)"
# The share of examples that becomes the test split of data without one.
CARVED = 0.2

Pair = tuple[np.ndarray, np.ndarray]


def from_file(path: Path) -> Arrays:
    """Reads an `.npz` file of the arrays that `from_arrays` takes.

    Raises:
      UserError: the file cannot be read, holds pickled objects, which are never loaded, or
        `from_arrays` refuses its arrays.
    """
    try:
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                raise UserError(f"{path}: one array; an .npz file has the arrays {WANTED}")
            found = dict(stored)
    except UserError:
        raise
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError) as e:
        pickled = "it holds pickled objects, which are never loaded: save arrays of numbers"
        reason = pickled if "pickle" in str(e) else f"no .npz file, or a damaged one ({e})"
        raise UserError(f"{path}: {reason}") from e
    return from_arrays(found, str(path))


def from_arrays(data: Any, name: str = "data") -> Arrays:
    """Returns a user's arrays, checked, as the laboratory has them.

    Args:
      data: a mapping with `x_train` and `y_train`, and where there are such splits
        `x_validation`, `y_validation`, `x_test`, `y_test`; or (train, test), or (train,
        validation, test), of pairs (x, y); or one pair (x, y). x is `[n, ...]`; integers that
        are no bytes are tokens, which no network gets scaled. y is `[n]`
        integers, which are classes from 0; or `[n]` or `[n, k]` floats, which are numbers to
        predict. Without a test split a fifth of the examples becomes one, at random but
        always the same.
      name: of the data, in messages.

    Raises:
      UserError: an array is missing, empty, not of numbers or not finite; lengths or shapes
        differ; a label is negative, or a class that no training example has.
    """
    pairs = {split: _pair(pair, split, name) for split, pair in _splits(data, name).items()}
    note = ""
    if "test" not in pairs:
        pairs["train"], pairs["test"] = _carve(*pairs["train"], name)
        sizes = (len(pairs[split][1]) for split in ("test", "train"))
        note = "{:,} random examples are its test split, {:,} are left".format(*sizes)
    _check_alike(pairs, name)
    classes = _classes(pairs, name)
    dtype = np.int32 if classes else np.float32
    train, test, *held_out = (
        (pairs[s][0], pairs[s][1].astype(dtype))
        for s in ("train", "test", "validation")
        if s in pairs
    )
    arrays = Arrays.create(*train, *test, classes)
    return arrays._replace(validation=held_out[0] if held_out else None, note=note)


def _splits(data: Any, name: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(data, Mapping):
        found = {}
        for split in ("train", "validation", "test"):
            keys = f"x_{split}", f"y_{split}"
            missing = [key for key in keys if key not in data]
            if len(missing) == 1 or (missing and split == "train"):
                has = ", ".join(map(str, data)) or "nothing"
                raise UserError(f"{name} has no {missing[0]} but {has}: wanted are {WANTED}")
            if not missing:
                found[split] = tuple(data[key] for key in keys)
        return found
    if isinstance(data, tuple | list) and len(data) in (2, 3):
        if all(isinstance(part, tuple | list) and len(part) == 2 for part in data):
            names = ("train", "validation", "test") if len(data) == 3 else ("train", "test")
            return {split: tuple(pair) for split, pair in zip(names, data, strict=True)}
        if len(data) == 2:
            return {"train": tuple(data)}
    raise UserError(
        f"{name} is a {type(data).__name__}: wanted is a mapping with {WANTED}, "
        "or a pair (x, y), or pairs (train, test)"
    )


def _pair(pair: tuple[Any, Any], split: str, name: str) -> Pair:
    x, y = _numbers(pair[0], f"x_{split}", name), _numbers(pair[1], f"y_{split}", name)
    if x.ndim < 2:
        raise UserError(f"{name}: x_{split} is {_shape(x)}, it must be [examples, ...]")
    if not 1 <= y.ndim <= 2:
        raise UserError(
            f"{name}: y_{split} is {_shape(y)}, it must be [examples] or [examples, k]"
        )
    if len(x) != len(y) or not len(y):
        raise UserError(
            f"{name}: x_{split} has {len(x):,} examples and y_{split} {len(y):,}: "
            "there must be as many, and at least one"
        )
    if y.ndim == 2 and y.shape[1] == 1 and y.dtype.kind in "iu":
        y = y[:, 0]  # Keras' CIFAR-10
    return x, y


def _numbers(value: Any, what: str, name: str) -> np.ndarray:
    """The values as bytes, int32 or float32."""
    array = np.asarray(value)
    kind = array.dtype.kind
    if kind == "b":
        return array.astype(np.uint8)
    if kind not in "iuf":
        raise UserError(f"{name}: {what} is of {array.dtype}, it must be of numbers")
    if array.dtype == np.uint8:
        return array
    if kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        wrong = np.atleast_1d(~np.isfinite(array).all(tuple(range(1, array.ndim))))
        if wrong.any():
            raise UserError(
                f"{name}: {what} has {wrong.sum():,} examples that are not finite in float32, "
                f"the first is example {np.argmax(wrong)}"
            )
        return array
    limits = np.iinfo(np.int32)
    if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
        raise UserError(f"{name}: {what} has integers beyond 32 bits")
    return array.astype(np.int32)


def _carve(x: np.ndarray, y: np.ndarray, name: str) -> tuple[Pair, Pair]:
    order = np.random.default_rng(1).permutation(len(y))
    count = round(CARVED * len(y))
    if not count:
        raise UserError(f"{name} has {len(y)} examples: too few for a test split")
    test, train = np.sort(order[:count]), np.sort(order[count:])
    return (x[train], y[train]), (x[test], y[test])


def _check_alike(pairs: dict[str, Pair], name: str) -> None:
    x_train, y_train = pairs["train"]
    for split, (x, y) in pairs.items():
        for letter, own, first in (("x", x, x_train), ("y", y, y_train)):
            if own.shape[1:] != first.shape[1:] or own.dtype != first.dtype:
                raise UserError(
                    f"{name}: {letter}_train is {_shape(first)} and {letter}_{split} "
                    f"{_shape(own)}: examples must have one shape and one type"
                )


def _classes(pairs: dict[str, Pair], name: str) -> int:
    """How many classes there are; 0 where the labels are numbers to predict."""
    labels = pairs["train"][1]
    if labels.dtype.kind == "f":
        return 0
    if labels.ndim > 1:
        raise UserError(
            f"{name}: y_train is {_shape(labels)}: classes are [examples]; make numbers floats"
        )
    for split, (_, y) in pairs.items():
        if y.min() < 0:
            raise UserError(f"{name}: y_{split} has the label {y.min()}, classes count from 0")
        if y.max() > labels.max():
            raise UserError(
                f"{name}: y_{split} has the label {y.max()}, the largest of y_train is "
                f"{labels.max()}"
            )
    if labels.max() >= len(labels):
        raise UserError(
            f"{name}: y_train has the label {labels.max()} in {len(labels):,} examples: "
            "classes count from 0; make numbers to predict floats"
        )
    return max(2, int(labels.max()) + 1)


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
