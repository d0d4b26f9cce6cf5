"""Image classification sets of tensorflow-datasets, read without TensorFlow.

`tfds.data_source` reads what was prepared as array_record files. Preparing a set, the
first download included, needs TensorFlow once.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from bn_jax.errors import UserError, expanded
from bn_jax.lab.data import originals
from bn_jax.lab.data.arrays import Arrays
from bn_jax.lab.data.cache import crc32

INPUT, LABEL = "image", "label"
NAME = re.compile(r"([a-z][a-z0-9_]*)(/[\w.-]+)?(:[\d.*]+)?")
# Read one by one they take three times as long.
RECORDS = 500


class Source(NamedTuple):
    """A set by its name, "set", "set/config" or "set/config:version", and where it lies."""

    name: str
    data_dir: Path

    @property
    def folder(self) -> Path:
        """Of the set, with all its configs and versions.

        Raises:
          UserError: the name is none.
        """
        match = NAME.fullmatch(self.name)
        if match is None:
            raise _unknown(self.name)
        return self.data_dir / match[1]

    def fingerprint(self) -> str:
        """What lies prepared there, of the config if the name has one; "" where nothing does.

        Every file's path and CRC-32. No times: a copy is the same set. Nor sizes alone, which
        a set may keep when its labels are mended. CIFAR-10's records take 25 ms.
        """
        own = self.data_dir / self.name.partition(":")[0]
        found = (p for p in self.folder.rglob("*") if p.is_file() and p.is_relative_to(own))
        return "\n".join(f"{p.relative_to(self.data_dir)} {crc32(p)}" for p in sorted(found))

    def preparation(self) -> str:
        """The command that prepares the set."""
        program = (
            f"import tensorflow_datasets as tfds; tfds.builder({self.name!r}, "
            f"data_dir={str(self.data_dir)!r}, file_format='array_record')"
            ".download_and_prepare()"
        )
        # Double quotes are easier to read than what shlex makes of the single ones inside.
        quoted = shlex.quote(program) if re.search(r'["$`\\!]', program) else f'"{program}"'
        return f"pip install tensorflow importlib_resources && python -c {quoted}"


def resolve_data_dir(data_dir: str | None) -> Path:
    """`data_dir`, else `TFDS_DATA_DIR`, else tensorflow-datasets' default, as a full path."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return expanded(chosen, "data_dir").resolve()


def read(source: Source, say: Callable[[str], None]) -> Arrays:
    """Decodes every training and test image.

    The test images are the `test` split, or `validation` in a set that has no `test`.

    Args:
      source: the set.
      say: told that it starts to decode, which takes seconds to minutes.

    Raises:
      UserError: the set is unknown, not prepared, prepared in another file format, damaged,
        not an image classification set, or of images that differ in shape.
    """
    with reading(source):
        return _read(source, say)


@contextlib.contextmanager
def reading(source: Source):
    """What goes wrong inside becomes a UserError that says how to prepare the set again."""
    try:
        with _quiet():
            yield
    except UserError:
        raise
    # What reads the files has no errors of its own: RuntimeError, ParseError, Pillow's...
    except Exception as e:
        raise UserError(
            f"dataset {source.name!r} cannot be read from {source.folder}: {first_line(e)}; "
            f"if its files are damaged, delete that folder, then {source.preparation()}"
        ) from e


def _read(source, say):
    builder = prepared(source)
    shape, classes = image_and_classes(source.name, builder.info.features)
    if None in shape:
        raise UserError(
            f"dataset {source.name!r} has images of shape {shape}: only sets whose images are "
            "all of one size can be held on the device"
        )
    splits = _splits(source.name, builder.info)
    count = sum(builder.info.splits[s].num_examples for s in splits)
    say(f"decoding the {count:,} images of {source.name}; the next start finds them cached")
    train, test = (_decode(source, builder, s) for s in splits)
    for split, (images, labels) in zip(splits, (train, test), strict=True):
        _check_values(split, images, labels, classes)
    return Arrays.create(*train, *test, classes)


def _check_values(split, images, labels, classes):
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise ValueError(
            f"{split} has {wrong.size} labels that are none of the {classes} classes, the "
            f"first is {labels[wrong[0]]} of example {wrong[0]}"
        )
    if np.issubdtype(images.dtype, np.floating):
        finite = np.isfinite(images).all(tuple(range(1, images.ndim)))
        if not finite.all():
            raise ValueError(
                f"{split} has {(~finite).sum()} images with pixels that are not finite, the "
                f"first is example {np.argmin(finite)}"
            )


def prepared(source: Source):
    """tensorflow-datasets' builder of a set that is prepared.

    Raises:
      UserError: the set is unknown or not prepared.
    """
    builder = _builder(source)
    if not builder.info.splits:
        instead = ""
        if source.name in originals.SETS:
            instead = f"or put the files of its authors into {source.data_dir / source.name}; "
        raise UserError(
            f"dataset {source.name!r} is not prepared in {source.data_dir}; {instead}preparing "
            f"needs TensorFlow once: {source.preparation()}"
        )
    return builder


def open_records(source: Source, builder, split: str, decoders=None):
    """tensorflow-datasets' data source of a split.

    Raises:
      UserError: the set is prepared in a file format that only TensorFlow reads.
    """
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError:
        file_format = builder.info.file_format
        raise UserError(
            f"dataset {source.name!r} is prepared as {file_format and file_format.value} in "
            f"{builder.data_path}, which only TensorFlow reads; delete that folder, then "
            f"{source.preparation()}"
        ) from None


def _builder(source):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(source.name, data_dir=source.data_dir)
    except tfds.core.DatasetNotFoundError:
        if source.folder.is_dir():
            raise _not_there(source, "it is not among what is prepared") from None
        raise _unknown(source.name) from None
    except AssertionError as e:  # of the version
        raise _not_there(source, str(e).strip()) from e
    except ValueError as e:
        if "BuilderConfig" in str(e):
            raise _not_there(source) from e
        raise


def _unknown(name):
    return UserError(
        f"unknown dataset {name!r}: circles, digits, or a name of tensorflow-datasets such "
        "as mnist, fashion_mnist, cifar10 (lower case; /config and :version may follow)"
    )


def _not_there(source, reason="there is no such config"):
    found = [p.parent for p in source.folder.rglob("dataset_info.json")]
    prepared = ", ".join(sorted(str(p.relative_to(source.data_dir)) for p in found))
    return UserError(
        f"dataset {source.name!r}: {reason}; prepared in {source.data_dir}: "
        f"{prepared or 'none'}"
    )


def image_and_classes(name: str, features: Any) -> tuple[tuple[int | None, ...], int]:
    """Shape of the images and number of classes of a set with these features.

    Raises:
      UserError: it is no image classification set.
    """
    import tensorflow_datasets

    kinds = tensorflow_datasets.features
    features = dict(features.items()) if hasattr(features, "items") else {}
    image, label = features.get(INPUT), features.get(LABEL)
    if not isinstance(image, kinds.Image) or not isinstance(label, kinds.ClassLabel):
        found = ", ".join(f"{k}: {type(v).__name__}" for k, v in sorted(features.items()))
        raise UserError(
            f"dataset {name!r} has the features {found}: an image classification set has "
            f"{INPUT!r} (Image) and {LABEL!r} (ClassLabel)"
        )
    return image.shape, label.num_classes  # type: ignore[reportReturnType]  # untyped there


def _splits(name, info):
    test = "test" if "test" in info.splits else "validation"
    missing = [s for s in ("train", test) if s not in info.splits]
    if missing:
        raise UserError(
            f"dataset {name!r} has the splits {', '.join(info.splits)}: it needs train, and "
            "test or validation"
        )
    return "train", test


def _decode(source, builder, split):
    features = builder.info.features
    records = open_records(source, builder, split)
    images = np.empty((len(records), *features[INPUT].shape), features[INPUT].np_dtype)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), RECORDS):
        rows = range(start, min(start + RECORDS, len(records)))
        for i, example in zip(rows, records.__getitems__(rows), strict=True):
            images[i], labels[i] = example[INPUT], example[LABEL]
    return images, labels


def first_line(error: Exception) -> str:
    """Its type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextlib.contextmanager
def _quiet():
    """Without tensorflow-datasets' remarks on missing OpenCV and unprepared folders."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
