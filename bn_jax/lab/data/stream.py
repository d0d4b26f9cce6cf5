"""A set of labelled images that is too large to hold: read from disk by grain, batch by batch.

The set is one of tensorflow-datasets, such as `imagenet2012`, prepared as array_record files.
Which examples a batch has and what is cut out of them depends on the seed and the batch's
number alone: not on how many workers there are, nor on where the iteration began.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets
from absl import flags

from bn_jax.errors import UserError
from bn_jax.lab.data import images, tfds
from bn_jax.lab.data.tfds import INPUT, LABEL

# The reader keeps every file open. ImageNet has 1,024 to train on; a usual limit is 1,024.
OPEN_FILES = 16_384
AHEAD = 2  # batches that each worker process holds ready


class Batch(NamedTuple):
    """One process's b examples of a batch.

    `images` uint8 `[b, size, size, 3]` and `labels` int32 `[b]`; `counted` bool `[b]` is False
    for what fills up the last batch and for broken images, whose pixels and labels are 0;
    `broken` int64 `[b]` has the numbers of the broken ones in the set, and -1 elsewhere.
    """

    images: np.ndarray
    labels: np.ndarray
    counted: np.ndarray
    broken: np.ndarray


class Records(NamedTuple):
    """A split, its images encoded. `name` is that of the set and of the split."""

    name: str
    num_classes: int
    data: Sequence[dict[str, Any]]

    def example(self, number: int) -> tuple[bytes, int]:
        """An encoded image and its label; a UserError if it cannot be read, or is no class."""
        try:
            found = self.data[number]
        except Exception as e:  # RuntimeError, ParseError...
            raise UserError(
                f"{self.name}, example {number} cannot be read ({tfds.first_line(e)}): copy "
                "its files again, or prepare the set again"
            ) from e
        label = int(found[LABEL])
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{self.name}, example {number} has the label {label} of {self.num_classes} "
                "classes: choose a split that has labels, or prepare the set again"
            )
        return found[INPUT], label


def open_split(name: str, data_dir: str | None, split: str) -> Records:
    """Opens a split of a set that tensorflow-datasets has prepared as array_record files.

    Args:
      name: of the set, such as `imagenet2012`; /config and :version may follow.
      data_dir: of tensorflow-datasets; else `TFDS_DATA_DIR`, else its default.
      split: such as `train`, or a part of one in brackets: `train[:10%]`.

    Raises:
      UserError: the set is unknown, not prepared, prepared in another file format, or of no
        labelled RGB images; there is no such split, or nothing in it.
    """
    source = tfds.Source(name, tfds.resolve_data_dir(data_dir))
    with tfds.reading(source):
        builder = tfds.prepared(source)
        if split.partition("[")[0] not in builder.info.splits:
            raise UserError(
                f"dataset {name!r} has no split {split!r}: {', '.join(builder.info.splits)}"
            )
        shape, classes = tfds.image_and_classes(name, builder.info.features)
        if shape[-1] != 3:
            raise UserError(f"dataset {name!r} has images of shape {shape}: 3 channels are due")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < OPEN_FILES:  # no limit is -1
            most = min(OPEN_FILES, hard) if hard >= 0 else OPEN_FILES
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        skip = {INPUT: tensorflow_datasets.decode.SkipDecoding()}
        data = tfds.open_records(source, builder, split, skip)
        if not len(data):
            raise UserError(f"dataset {name!r} has no examples in its split {split!r}")
        return Records(f"{name} {split}", classes, data)


def batches(
    records: Records,
    *,
    batch_size: int,
    image_size: int = 224,
    train: bool,
    seed: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    first_step: int = 0,
) -> Generator[Batch]:
    """Batches without end for training, or once through all examples for evaluation.

    For training the order is drawn anew for every epoch, batches run on from one epoch into
    the next, and what is cut out is random (`images.for_training`). For evaluation the order
    is that of the files, and it is the centre (`images.for_evaluation`).

    Args:
      records: of `open_split`.
      batch_size: of all processes together; a multiple of their number.
      image_size: height and width of the result.
      train: which of the two.
      seed: of the order and of what is cut out.
      workers: processes that decode; with 0 it is done here, when a batch is asked for.
      process_index, process_count: this process yields every process_count-th example of
        each batch, from process_index on.
      first_step: the number of the first batch; none before it is read.

    Raises:
      UserError: of an example that cannot be read, at its turn; a worker has died.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its own; a notebook never parses any

    n, shape = len(records.data), (image_size, image_size, 3)
    nothing = (np.zeros((), kind) for kind in (np.int32, bool, np.int64))
    empty = Batch(np.zeros(shape, np.uint8), *nothing)._replace(broken=np.array(-1))

    def example(number, rng=None):
        if number >= n:
            return empty
        encoded, label = records.example(number)
        try:
            if rng is None:
                image = images.for_evaluation(encoded, image_size)
            else:
                image = images.for_training(encoded, image_size, rng)
        except Exception:  # of a dozen types, for a broken image
            return empty._replace(broken=np.array(number))
        return Batch(image, np.array(label, np.int32), np.array(True), np.array(-1))

    if train:
        examples = grain.MapDataset.range(n).seed(seed).shuffle().repeat().random_map(example)
    else:
        examples = grain.MapDataset.range(-(-n // batch_size) * batch_size).map(example)
    mine = examples[process_index::process_count].batch(batch_size // process_count)
    # A batch is one element: more than one at a time are for workers to make.
    iterator = iter(
        mine[first_step:]
        .to_iter_dataset(grain.ReadOptions(0, 0))
        .mp_prefetch(
            grain.MultiprocessingOptions(workers, AHEAD), worker_init_fn=_end_with_parent
        )
    )
    try:
        for batch in iterator:
            # Without grain's subclass of arrays in shared memory.
            yield Batch(*map(np.asarray, batch))
    except UserError as e:
        raise UserError(str(e)) from None  # without the note that grain adds
    except RuntimeError as e:  # grain's, when one of its processes has died
        raise UserError(
            f"the processes that decode images have failed ({str(e).partition('. ')[0]}): if "
            "memory or /dev/shm is short, choose fewer workers or a smaller batch_size"
        ) from e
    finally:
        iterator.close()


def _end_with_parent(worker, workers):
    """Ends this worker process with the one that started it, even if that is killed.

    grain's workers wait for their parent for ever, and would print a traceback at Ctrl-C. At
    SIGTERM the parent may want one more batch before it saves.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # both may come to the whole group
        signal.signal(number, signal.SIG_IGN)

    parent = multiprocessing.parent_process()

    def wait():
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
