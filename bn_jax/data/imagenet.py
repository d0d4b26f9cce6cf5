"""ImageNet, or any set of labelled images that is too large to hold, as batches of pixels.

grain decodes in worker processes. Which examples a batch has and what is cut out of them
depends on the seed and the batch's number alone: not on how many workers there are, nor on
where the iteration began.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple, TypeVar

import grain
import numpy as np
from absl import flags

from bn_jax.data import images
from bn_jax.data.records import Records, open_split
from bn_jax.errors import UserError

__all__ = ["Batch", "Records", "batches", "open_split", "to_device"]

AHEAD = 2  # batches that each worker process holds ready
T = TypeVar("T")


class Batch(NamedTuple):
    """One process's b examples of a batch.

    `images` uint8 `[b, size, size, 3]` and `labels` int32 `[b]`; `counted` bool `[b]` is False
    for what fills up the last batch and for broken images, whose pixels and labels are 0;
    `bad` bool `[b]` is True for the broken ones.
    """

    images: np.ndarray
    labels: np.ndarray
    counted: np.ndarray
    bad: np.ndarray


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
    max_bad_examples: int = 0,
    first_step: int = 0,
) -> Iterator[Batch]:
    """Batches without end for training, or once through all examples for evaluation.

    For training the examples come in an order that is drawn anew for every epoch, batches
    run on from one epoch into the next, and what is cut out of an image is random
    (`images.for_training`). For evaluation they come in the order of the files, each counted
    once in one process, and it is the centre (`images.for_evaluation`).

    Args:
      records: of `open_split`.
      batch_size: of all processes together.
      image_size: height and width of the result.
      train: which of the two.
      seed: of the order and of what is cut out; 0 to 2**32 - 1.
      workers: processes that decode; with 0 it is done here, when a batch is asked for.
      process_index, process_count: this process reads and yields every process_count-th
        example of each batch, from process_index on. All yield as many batches.
      max_bad_examples: how many images may be broken, each counted once by each iterator.
      first_step: the number of the first batch; none before it is read.

    Raises:
      UserError: batch_size does not divide; and, once the example is reached, more images are
        broken than may be, a label is no class, a file cannot be read, a worker has died.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size}: choose a multiple of the {process_count} processes"
        )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its own; a notebook never parses any
    source = _Batches(
        records, batch_size, image_size, train, seed, process_index, process_count
    )
    dataset = grain.MapDataset.source(source)[first_step:]
    # A batch is one element of the dataset: more than one at a time are for workers to make.
    iterable = dataset.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
        grain.MultiprocessingOptions(workers, AHEAD), worker_init_fn=_end_with_parent
    )
    return _watched(iterable, source, first_step, max_bad_examples)


def to_device(batches: Iterable[T], put: Callable[[T], T]) -> Iterator[T]:
    """`put(batch)` for each, always called for one more before the last is handed out.

    Where `put` returns at once, as `functools.partial(jax.device_put, device=sharding)` does,
    the next batch is on its way to the device while a step works on this one.
    """
    ahead = []
    for batch in batches:
        ahead.append(put(batch))
        if len(ahead) == 2:
            yield ahead.pop(0)
    yield from ahead


class _Batches:
    """The batches by their number, for grain. Nothing is kept from one to the next."""

    def __init__(self, records, batch_size, image_size, train, seed, index, count):
        self.records, self.batch_size, self.image_size = records, batch_size, image_size
        self.train, self.seed, self.process = train, seed, slice(index, None, count)

    @cached_property
    def order(self):
        """The index of the example at each position; without end for training."""
        indices = grain.MapDataset.range(self.records.ends[-1])
        return indices.seed(self.seed).shuffle().repeat() if self.train else indices

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def positions(self, step):
        return range(step * self.batch_size, (step + 1) * self.batch_size)[self.process]

    def __getitem__(self, step):
        positions, size = self.positions(step), self.image_size
        n = len(positions)
        batch = Batch(
            np.zeros((n, size, size, 3), np.uint8),
            np.zeros(n, np.int32),
            np.zeros(n, bool),
            np.zeros(n, bool),
        )
        for row, position in enumerate(positions):
            if position < len(self.order):
                self._fill(batch, row, position)
        return batch

    def _fill(self, batch, row, position):
        example = self.records.example(self.order[position])
        try:
            batch.images[row] = self.decode(example.image, position)
        except Exception:  # of a dozen types, for a broken image
            batch.bad[row] = True
        else:
            batch.labels[row], batch.counted[row] = example.label, True

    def decode(self, encoded, position):
        if not self.train:
            return images.for_evaluation(encoded, self.image_size)
        rng = np.random.default_rng((self.seed, position))
        return images.for_training(encoded, self.image_size, rng)

    def refusal(self, position, found, allowed):
        """The error that names the broken image at this position."""
        index = self.order[position]
        example = self.records.example(index)
        try:
            reason = "it could not be decoded"
            self.decode(example.image, position)
        except Exception as e:
            reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        return UserError(
            f"{found} broken images, the last of them {self.records.describe(index, example)}: "
            f"{reason}; allow that many with max_bad_examples (now {allowed}), or prepare the "
            "set again"
        )


def _watched(iterable, source, first_step, max_bad_examples):
    """The batches, ended by a UserError when one example too many is broken."""
    broken, iterator = set(), iter(iterable)
    try:
        for step, batch in enumerate(iterator, first_step):
            for row in np.flatnonzero(batch.bad):
                position = source.positions(step)[row]
                broken.add(source.order[position])
                if len(broken) > max_bad_examples:
                    raise source.refusal(position, len(broken), max_bad_examples)
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

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
