"""`load`: a dataset by name or from arrays, split and ready for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.errors import UserError, expanded
from bn_jax.lab.data import originals, tfds
from bn_jax.lab.data.arrays import Arrays
from bn_jax.lab.data.cache import cached, default_cache_dir, mapped, newest
from bn_jax.lab.data.given import from_arrays, from_file
from bn_jax.lab.data.toy import TOYS

SCALINGS = ("standard", "unit", "raw", "binary")


class Split(NamedTuple):
    """Inputs `[n, ...]` as they are stored (uint8 for images).

    Labels are classes, int32 `[n]`, or numbers to predict, float32 `[n]` or `[n, k]`.
    """

    inputs: jax.Array
    labels: jax.Array


class Dataset(NamedTuple):
    """Three splits on the device, and the affine map that a network's input goes through.

    A network sees `(inputs - offset) * factor` in float32: stored inputs are a quarter of
    the size of scaled ones.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int  # 0: numbers are predicted
    offset: jax.Array
    factor: jax.Array

    def scaled(self, inputs: jax.Array) -> jax.Array:
        """Returns stored inputs as a network sees them, float32; int32 ones stay: tokens."""
        if inputs.dtype == jnp.int32:
            return inputs
        return (inputs.astype(jnp.float32) - self.offset) * self.factor


def load(
    data: Any,
    *,
    validation_fraction: float = 0.2,
    train_examples: int | None = None,
    scaling: str = "standard",
    data_dir: str | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Dataset:
    """Loads a dataset.

    Args:
      data: `circles`, `digits`; the name of a set of tensorflow-datasets, "set",
        "set/config" or "set/config:version"; of mnist, fashion_mnist, cifar10 and cifar100
        also what their authors distribute, unpacked in `data_dir`; an `.npz` file; or arrays
        or a function that returns them (see `bn_jax.lab.data.given.from_arrays`).
      validation_fraction: share of the training examples that is carved off, at random
        but always the same, for choosing among runs; in [0, 1). With 0 nothing is, and
        the validation split is the training split. Data that brings a validation split
        keeps it.
      train_examples: how many of the others to train on, at random but always the same; by
        default all.
      scaling: `standard` (mean 0 and variance 1 in each channel, over the training inputs
        with those held out), `unit` (divided by the largest magnitude), `raw`, or `binary`
        (1 above half the largest magnitude, 0 elsewhere).
      data_dir: of tensorflow-datasets or of those files; else `TFDS_DATA_DIR`, else
        tensorflow-datasets' default.
      cache_dir: for decoded arrays; by default under the user's cache directory. Where a set
        is not prepared, what was last cached by that name is used, whatever machine did it.
      say: told what takes long, what was done to the data, and that the set is the cache's
        alone.

    Raises:
      UserError: anything about the names or files that the user can mend.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction {validation_fraction}: it must be in [0, 1)")
    arrays = _arrays(data, data_dir, cache_dir, say)
    if arrays.note:
        say(f"{_named(data)}: {arrays.note}")
    n = len(arrays.train_labels)
    held_out = 0 if arrays.validation else round(n * validation_fraction)
    if held_out == n or (validation_fraction and not held_out and not arrays.validation):
        raise UserError(
            f"validation_fraction {validation_fraction} of {n} examples leaves a part empty"
        )
    if train_examples is not None and not 1 <= train_examples <= n - held_out:
        raise UserError(
            f"train_examples {train_examples}: {_named(data)} has {n - held_out} training "
            "examples"
        )
    order = np.random.default_rng(0).permutation(n)
    offset, factor = _affine(arrays, scaling)

    def put(inputs, labels):
        if scaling == "binary":
            inputs = (inputs > arrays.peak / 2).astype(np.uint8)
        return Split(jnp.asarray(inputs), jnp.asarray(labels))

    def split(rows):
        # Sorted: an ordered gather from a mapped file is several times faster.
        rows = np.sort(rows)
        return put(arrays.train_inputs[rows], arrays.train_labels[rows])

    train = split(order[held_out:][:train_examples])
    validation = split(order[:held_out]) if held_out else train
    return Dataset(
        train,
        put(*arrays.validation) if arrays.validation else validation,
        put(arrays.test_inputs, arrays.test_labels),
        arrays.num_classes,
        offset,
        factor,
    )


def _named(data: Any) -> str:
    return data if isinstance(data, str) else "data"


def _arrays(
    data: Any, data_dir: str | None, cache_dir: str | None, say: Callable[[str], None]
) -> Arrays:
    if isinstance(data, Path) or (isinstance(data, str) and data.endswith(".npz")):
        return from_file(expanded(data, "dataset"))
    if not isinstance(data, str):
        return from_arrays(data() if callable(data) else data)
    name, folder = data, expanded(cache_dir, "cache_dir") if cache_dir else default_cache_dir()
    if name in TOYS:
        return TOYS[name](folder)
    source = tfds.Source(name, tfds.resolve_data_dir(data_dir))
    if files := originals.find(name, source.data_dir):
        return cached(name, files.fingerprint(), folder, files.read)
    fingerprint = source.fingerprint()
    if not fingerprint and (entry := newest(name, folder)):
        say(f"{name} is not prepared in {source.data_dir}: taken from the cache, {entry}")
        return mapped(entry)
    return cached(name, fingerprint, folder, lambda: tfds.read(source, say))


def _affine(arrays, scaling):
    if scaling == "standard":
        std = np.array(arrays.std)
        offset, factor = np.array(arrays.mean), 1 / np.where(std > 0, std, 1)
    elif scaling in SCALINGS:
        offset, factor = 0.0, 1 / (arrays.peak or 1) if scaling == "unit" else 1.0
    else:
        raise UserError(f"unknown scaling {scaling!r}: {', '.join(SCALINGS)}")
    ones = (1,) * (arrays.train_inputs.ndim - 1)
    return tuple(jnp.asarray(v, jnp.float32).reshape(*ones, -1) for v in (offset, factor))
