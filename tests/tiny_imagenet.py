"""A small `imagenet2012` as tensorflow-datasets prepares it, written without TensorFlow.

`dataset_info.json`, `features.json` and `label.labels.txt` are, byte for byte, what
tensorflow-datasets 4.9.10 writes for the same examples with TensorFlow.
"""

import io
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Example(NamedTuple):
    file_name: str
    image: bytes
    label: int


def jpeg(pixels, mode="RGB", **options):
    """Encodes uint8 pixels as JPEG, in another mode of Pillow's if wanted."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(encoded, "jpeg", **options)
    return encoded.getvalue()


def picture(label, width, height, seed):
    """uint8 `[height, width, 3]`: stripes whose width tells the label, darker to the bottom."""
    rng = np.random.default_rng(seed)
    dark, bright = rng.integers(0, 100, 3), rng.integers(155, 256, 3)
    stripes = (np.arange(width) // (3 * label + 2) + rng.integers(2)) % 2
    shade = np.linspace(1, 0.5, height)[:, None, None]
    return (shade * np.where(stripes[:, None] == 0, dark, bright)).astype(np.uint8)


def examples(count, *, classes=4, width=64, height=48, seed=0):
    """Labels 0, 1, ... in turn, of the set's 1,000; widths and heights differ by a little."""
    made = []
    for i in range(count):
        pixels = picture(i % classes, width + i % 3, height + i % 2, (seed, i))
        made.append(Example(f"n{i % classes:08}_{seed}{i}.JPEG", jpeg(pixels), i % classes))
    return made


def write(data_dir, splits=None, shards=2):
    """Writes the splits (names to lists of Example), each in `shards` files.

    By default 16 examples to train on and 10 for validation. Returns the folder with the
    files.
    """
    import tensorflow_datasets as tfds

    if splits is None:
        splits = {"train": examples(16), "validation": examples(10, seed=1)}
    builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format="array_record")
    info, folder = builder.info, Path(builder.data_path)
    folder.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=info.name, filetype_suffix="array_record"
    )
    written = [
        _write_split(info.features, template.replace(split=split), content, shards)
        for split, content in splits.items()
    ]
    info.set_splits(tfds.core.splits.SplitDict(written))
    info.write_to_directory(folder)
    return folder


def _write_split(features, template, content, shards):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())
    records = [serializer.serialize_example(example._asdict()) for example in content]
    bounds = [i * len(records) // shards for i in range(shards + 1)]
    parts = [records[start:stop] for start, stop in itertools.pairwise(bounds)]
    for path, part in zip(template.sharded_filepaths(shards), parts, strict=True):
        _write_file(path, part)
    return tfds.core.SplitInfo(
        name=template.split,
        shard_lengths=[len(part) for part in parts],
        num_bytes=sum(map(len, records)),
        filename_template=template,
    )


def _write_file(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
