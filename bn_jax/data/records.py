"""A split of one of tensorflow-datasets' sets of labelled images, read example by example.

For sets that are too large to be held decoded: the images stay encoded until they are needed.
"""

from __future__ import annotations

import bisect
import itertools
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bn_jax.data import tfds
from bn_jax.data.tfds import INPUT, LABEL, Source
from bn_jax.errors import UserError

# The reader keeps every file open. ImageNet has 1,024 to train on; a usual limit is 1,024.
OPEN_FILES = 16_384


class Example(NamedTuple):
    """An encoded image, its label, and its file's name if the set has it."""

    image: bytes
    label: int
    name: str


class Records(NamedTuple):
    """The examples of one split, read by index in any process."""

    source: Source
    split: str
    num_classes: int
    files: tuple[Path, ...]
    ends: tuple[int, ...]  # of the files, in examples
    data: Sequence[dict[str, Any]]

    def example(self, index: int) -> Example:
        """The example of this index, 0 to `ends[-1]` - 1.

        Raises:
          UserError: it cannot be read, or its label is no class.
        """
        try:
            found = self.data[index]
        except Exception as e:  # RuntimeError, ParseError...
            raise _damaged(self.source, self.files[bisect.bisect(self.ends, index)], e) from e
        name = found.get("file_name", b"").decode()
        example = Example(found[INPUT], int(found[LABEL]), name)
        if not 0 <= example.label < self.num_classes:
            raise UserError(
                f"{self.describe(index, example)} has the label {example.label} of "
                f"{self.num_classes} classes: choose a split that has labels, or prepare the "
                "set again"
            )
        return example

    def describe(self, index: int, example: Example) -> str:
        """Names the example in a message."""
        name = f" ({example.name})" if example.name else ""
        return f"{self.source.name} {self.split}, example {index}{name}"


def open_split(name: str, data_dir: str | None, split: str) -> Records:
    """Opens a split of a set that tensorflow-datasets has prepared as array_record files.

    Args:
      name: of the set, such as `imagenet2012`; /config and :version may follow.
      data_dir: of tensorflow-datasets; else `TFDS_DATA_DIR`, else its default.
      split: such as `train`, or a part of one in brackets: `train[:10%]`.

    Raises:
      UserError: the set is unknown, not prepared, prepared in another file format, or of no
        labelled images; there is no such split; a file of it is missing or truncated.
    """
    source = Source(name, tfds.resolve_data_dir(data_dir))
    with tfds.reading(source):
        return _open(source, split)


def _open(source, split):
    import tensorflow_datasets

    builder = tfds.prepared(source)
    info = builder.info
    if split.partition("[")[0] not in info.splits:
        raise UserError(
            f"dataset {source.name!r} has no split {split!r}: {', '.join(info.splits)}"
        )
    shape, classes = tfds.image_and_classes(source.name, info.features)
    if shape[-1] != 3:
        raise UserError(
            f"dataset {source.name!r} has images of shape {shape}: this needs 3 channels"
        )
    skip = {INPUT: tensorflow_datasets.decode.SkipDecoding()}
    data = tfds.open_records(source, builder, split, skip)
    parts = info.splits[split].file_instructions
    if not len(data):
        raise UserError(f"dataset {source.name!r} has no examples in its split {split!r}")
    _allow_open_files()
    _check_files(source, parts)
    ends = itertools.accumulate(part.take for part in parts)
    files = tuple(Path(part.filename) for part in parts)
    return Records(source, split, classes, files, tuple(ends), data)


def _check_files(source, parts):
    """All of them, which takes a tenth of a second for ImageNet's 1,024 on a local disk."""
    from array_record.python.array_record_module import ArrayRecordReader

    def check(part):
        path = Path(part.filename)
        if not path.exists():
            raise _damaged(source, path, "it is missing")
        found = ArrayRecordReader(part.filename).num_records()
        if found != part.examples_in_shard:
            raise _damaged(source, path, f"{found} of {part.examples_in_shard} examples")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(check, parts))


def _allow_open_files():
    """In this process and in those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _damaged(source, path, reason):
    reason = tfds.first_line(reason) if isinstance(reason, Exception) else reason
    return UserError(
        f"dataset {source.name!r}: damaged file {path} ({reason}): copy it again, or delete "
        f"{path.parent} and then {source.preparation()}"
    )
