"""Batches from a small set of real JPEG files in ImageNet's format; no network."""

import multiprocessing
import os
import resource
import signal
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_imagenet as tiny

from bn_jax.errors import UserError
from bn_jax.lab.data import images, stream
from bn_jax.lab.data.stream import batches, open_split

SIZE, COUNT = 28, 22
# Each with a label of its own: labels tell which examples a batch has.
EXAMPLES = tiny.examples(COUNT, classes=COUNT)
evaluate = partial(batches, image_size=SIZE, train=False)
train = partial(batches, image_size=SIZE, train=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write(folder, {"train": EXAMPLES, "validation": EXAMPLES[:5]}, shards=3)
    return str(folder)


@pytest.fixture(scope="module")
def records(data_dir):
    return open_split("imagenet2012", data_dir, "train")


@pytest.fixture
def opened(tmp_path):
    """`opened(examples)` are the records of a set that has these to train on."""

    def build(examples):
        tiny.write(tmp_path, {"train": examples}, shards=1)
        return open_split("imagenet2012", str(tmp_path), "train")

    return build


def first(count, iterator):
    return [batch for _, batch in zip(range(count), iterator, strict=False)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def counted(many):
    """The labels of all examples that count."""
    return np.concatenate([batch.labels[batch.counted] for batch in many]).tolist()


def test_a_part_of_a_split(data_dir):
    half = open_split("imagenet2012", data_dir, "train[50%:]")
    assert counted(evaluate(half, batch_size=4)) == list(range(COUNT // 2, COUNT))


@pytest.mark.parametrize("batch_size", [1, 4, 22, 30])
def test_evaluation_has_every_example_once_in_order(records, batch_size):
    found = list(evaluate(records, batch_size=batch_size))
    assert len(found) == -(-COUNT // batch_size)
    assert counted(found) == list(range(COUNT))
    for batch in found:
        assert batch.images.shape == (batch_size, SIZE, SIZE, 3)
        assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int32)
        assert (batch.broken == -1).all()
        assert not batch.images[~batch.counted].any()
        for image, label in zip(batch.images[batch.counted], batch.labels, strict=False):
            expected = images.for_evaluation(EXAMPLES[label].image, SIZE)
            np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_evaluate_every_example_once(records, processes):
    each = [
        list(evaluate(records, batch_size=6, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    assert {len(part) for part in each} == {4}
    assert {len(batch.labels) for part in each for batch in part} == {6 // processes}
    assert sorted(label for part in each for label in counted(part)) == list(range(COUNT))


def test_epochs_are_different_orders_of_all_examples(records):
    found = counted(first(33, train(records, batch_size=2)))
    epochs = [found[i * COUNT : (i + 1) * COUNT] for i in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    others = counted(first(33, train(records, batch_size=2, seed=1)))
    epochs += [others[i * COUNT : (i + 1) * COUNT] for i in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert list(range(COUNT)) not in epochs


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_on_the_batches_of_one(records, processes):
    def by_label(parts):
        pairs = [p for b in parts for p in zip(b.labels.tolist(), b.images, strict=True)]
        return sorted((label, image.tobytes()) for label, image in pairs)

    whole = first(9, train(records, batch_size=6))
    each = [
        first(9, train(records, batch_size=6, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    for batch, *parts in zip(whole, *each, strict=True):
        assert by_label([batch]) == by_label(parts)


@pytest.mark.parametrize("mode", [train, evaluate])
def test_a_run_resumes_at_any_step(records, mode):
    whole = first(7, mode(records, batch_size=4, seed=3))
    for step in range(8):
        rest = first(7 - step, mode(records, batch_size=4, seed=3, first_step=step))
        assert len(rest) == max(len(whole) - step, 0)
        assert all(map(equal, rest, whole[step:]))


def test_a_run_resumes_without_reading_what_is_past(records):
    read = []

    class Spy:
        def __len__(self):
            return COUNT

        def __getitem__(self, index):
            read.append(index)
            return records.data[index]

    next(train(records._replace(data=Spy()), batch_size=4, first_step=10**6))
    assert len(read) == 4


BROKEN = {
    "truncated": EXAMPLES[3].image[:600],
    "empty": b"",
    "text": b"not found" * 100,
    "header": EXAMPLES[3].image[:20] + b"\0" * 500,
}


def with_third(**changes):
    return [*EXAMPLES[:3], EXAMPLES[3]._replace(**changes), *EXAMPLES[4:6]]


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_counted_and_left_out(opened, content):
    records = opened(with_third(image=content))
    found = list(evaluate(records, batch_size=4))
    assert counted(found) == [0, 1, 2, 4, 5]
    broken = np.concatenate([batch.broken for batch in found]).tolist()
    assert broken == [-1] * 3 + [3] + [-1] * 4
    assert not found[0].images[3].any()
    met = first(6, train(records, batch_size=6))
    assert counted(met).count(3) == 0
    assert sum((batch.broken == 3).sum() for batch in met) == 6


@pytest.mark.parametrize("label", [-1, 1000])
def test_a_label_that_is_no_class(opened, label):
    records = opened(with_third(label=label))
    with pytest.raises(UserError, match=rf"example 3 has the label {label} of 1000"):
        list(evaluate(records, batch_size=2))


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:70_000]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"JFIF", b"JFIG")),
    ],
    ids=["missing", "empty", "cut", "changed"],
)
def test_a_damaged_file(tmp_path, damage):
    folder = tiny.write(tmp_path, {"train": EXAMPLES[:6]}, shards=2)
    damage(folder / "imagenet2012-train.array_record-00001-of-00002")
    with pytest.raises(UserError, match=r"prepare|array_record") as error:
        list(evaluate(open_split("imagenet2012", str(tmp_path), "train"), batch_size=3))
    assert "\n" not in str(error.value)


def test_a_set_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match=r"not prepared in .*download_and_prepare\(\)"):
        open_split("imagenet2012", str(tmp_path), "train")


def test_as_many_files_can_be_open_as_imagenet_has(data_dir):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    try:
        open_split("imagenet2012", data_dir, "train")
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_unknown_split(data_dir):
    with pytest.raises(UserError, match="no split 'test': train, validation"):
        open_split("imagenet2012", data_dir, "test")


def test_workers_change_nothing_and_tell_what_is_wrong(records, opened):
    # An epoch has more than these 20 examples: the last of them is met once.
    expected = first(5, train(records, batch_size=4))
    last = int(expected[-1].labels[-1])
    wrong = [e._replace(label=-1) if e.label == last else e for e in EXAMPLES]
    iterator = train(opened(wrong), batch_size=4, workers=2, first_step=1)
    assert all(map(equal, first(3, iterator), expected[1:4]))
    with pytest.raises(UserError, match=rf"^[^\n]*, example {last} has the label -1 [^\n]*$"):
        next(iterator)
    assert multiprocessing.active_children() == []


def test_a_worker_ends_with_its_parent(monkeypatch):
    """Which grain's do not when the parent is killed: they would wait for it for ever."""
    killed, ended = threading.Event(), threading.Event()
    parent = SimpleNamespace(join=killed.wait)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stream._end_with_parent(0, 1)
    assert not ended.wait(0.1)
    killed.set()
    assert ended.wait(10)
