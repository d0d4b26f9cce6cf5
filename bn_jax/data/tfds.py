"""Image classification sets of tensorflow-datasets, read without TensorFlow.

`tfds.data_source` reads what was prepared as array_record files. Preparing a set, the
first download included, needs TensorFlow once.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
from absl import logging

from bn_jax.data.arrays import Arrays
from bn_jax.errors import UserError

INPUT, LABEL = "image", "label"


def resolve_data_dir(data_dir: str | None) -> Path:
    """`data_dir`, else `TFDS_DATA_DIR`, else tensorflow-datasets' default, as a full path."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(chosen).expanduser().resolve()


def fingerprint(name: str, data_dir: Path) -> str:
    """What lies prepared under the name: every file's path, size and time of change."""
    folder = data_dir / name.partition(":")[0].partition("/")[0]
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    stats = ((p.relative_to(data_dir), p.stat()) for p in files)
    return "\n".join(f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats)


def read(name: str, data_dir: Path) -> Arrays:
    """Decodes every training and test image of the set `name`, "set/config:version".

    The test images are the `test` split, or `validation` in a set that has no `test`.

    Raises:
      UserError: the set is unknown, not prepared, prepared in another file format, not an
        image classification set, or of images that differ in shape.
    """
    with _quiet():
        builder = _builder(name, data_dir)
        if not builder.info.splits:
            raise UserError(
                f"dataset {name!r} is not prepared in {data_dir}; preparing needs TensorFlow "
                f"once: {_prepare(name, data_dir)}"
            )
        classes = _check_features(name, builder.info.features)
        train, test = (_decode(builder, split) for split in _splits(name, builder.info))
    return Arrays.create(*train, *test, classes)


def _builder(name, data_dir):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"unknown dataset {name!r}: circles, digits, or a name of tensorflow-datasets "
            "such as mnist, fashion_mnist, cifar10"
        ) from None
    except (ValueError, AssertionError, ImportError, OSError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise UserError(f"dataset {name!r} cannot be read from {data_dir}: {reason}") from None


def _prepare(name, data_dir):
    builder = f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
    return (
        "pip install tensorflow importlib_resources && "
        f'python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'
    )


def _check_features(name, features):
    """The number of classes."""
    import tensorflow_datasets as tfds

    features = dict(features.items()) if hasattr(features, "items") else {}
    found = ", ".join(f"{k}: {type(v).__name__}" for k, v in features.items())
    image, label = features.get(INPUT), features.get(LABEL)
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise UserError(
            f"dataset {name!r} has the features {found}: an image classification set has "
            f"{INPUT!r} (Image) and {LABEL!r} (ClassLabel)"
        )
    if None in image.shape:
        raise UserError(
            f"dataset {name!r} has images of shape {image.shape}: only sets whose images "
            "are all of one size can be held on the device"
        )
    return label.num_classes


def _splits(name, info):
    test = "test" if "test" in info.splits else "validation"
    missing = [s for s in ("train", test) if s not in info.splits]
    if missing:
        raise UserError(
            f"dataset {name!r} has the splits {', '.join(info.splits)}: it needs train, and "
            "test or validation"
        )
    return "train", test


def _decode(builder, split):
    features = builder.info.features
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError:
        file_format = builder.info.file_format
        command = _prepare(builder.name, builder.data_path.parent.parent)
        raise UserError(
            f"dataset {builder.name!r} is prepared as {file_format and file_format.value} in "
            f"{builder.data_path}, which only TensorFlow reads; delete it, then {command}"
        ) from None
    images = np.empty((len(source), *features[INPUT].shape), features[INPUT].np_dtype)
    labels = np.empty(len(source), np.int32)
    for i, example in enumerate(source):
        images[i], labels[i] = example[INPUT], example[LABEL]
    return images, labels


@contextlib.contextmanager
def _quiet():
    """Without tensorflow-datasets' remarks on missing OpenCV and unprepared folders."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
