"""ImageNet's pipeline on a small set of real JPEG files in its format; no network."""

import io
import multiprocessing
import os
import resource
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import handwritten
import numpy as np
import pytest
import tensorflow_datasets
import tiny_imagenet as tiny
from PIL import Image
from scipy import stats

from bn_jax.data import imagenet, images
from bn_jax.data.imagenet import batches, open_split, to_device
from bn_jax.errors import UserError

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


# The format


def test_tensorflow_datasets_reads_the_small_set(data_dir):
    folder = f"{data_dir}/imagenet2012/5.1.0"
    by_name = tensorflow_datasets.builder("imagenet2012", data_dir=data_dir)
    for builder in (by_name, tensorflow_datasets.builder_from_directory(folder)):
        found = builder.as_data_source("train")
        assert len(found) == COUNT
        for example, written in zip(found, EXAMPLES, strict=True):
            assert example["label"] == written.label
            assert example["file_name"].decode() == written.file_name
            pixels = np.asarray(Image.open(io.BytesIO(written.image)))
            np.testing.assert_array_equal(example["image"], pixels)
    assert "tensorflow" not in sys.modules


def test_records(records):
    assert records.num_classes == 1000
    for i, written in enumerate(EXAMPLES):
        assert records.example(i) == (written.image, written.label, written.file_name)


def test_a_part_of_a_split(data_dir):
    half = open_split("imagenet2012", data_dir, "train[50%:]")
    assert counted(evaluate(half, batch_size=4)) == list(range(COUNT // 2, COUNT))


# Evaluation


@pytest.mark.parametrize(("width", "height"), [(144, 96), (96, 144), (96, 96)])
def test_the_centre_is_cut_out(width, height):
    """As the usual recipe has it: the shorter side becomes 8/7 of the size; then crop."""
    encoded, size = tiny.jpeg(tiny.picture(1, width, height, 0)), 56
    smaller = width * 2 // 3, height * 2 // 3
    left, upper = ((side - size) // 2 for side in smaller)
    whole = Image.open(io.BytesIO(encoded)).resize(smaller, Image.Resampling.BILINEAR)
    expected = whole.crop((left, upper, left + size, upper + size))
    found = images.for_evaluation(encoded, size)
    np.testing.assert_allclose(found, np.asarray(expected), atol=1)


def smooth(width, height):
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / width * a + y / height * b) for a, b in ((9, 2), (3, 7))]
    return np.stack([*waves, (x * 255 / width)], -1).astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(501, 377), (403, 1001), (1203, 905)])
def test_large_images_are_decoded_smaller_to_the_same(width, height):
    encoded = tiny.jpeg(smooth(width, height), quality=95)
    size, box = 40, (7, 120, 7 + width // 2, 120 + height // 2)
    whole = Image.open(io.BytesIO(encoded))
    expected = whole.resize((size, size), Image.Resampling.BILINEAR, box)
    found = images.decode(encoded, size, lambda *_: box)
    assert not np.array_equal(found, expected)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_become_rgb(mode):
    pixels = Image.fromarray(smooth(64, 64))
    expected = pixels.convert("L").convert("RGB") if mode == "L" else pixels
    encoded = tiny.jpeg(np.asarray(pixels), mode, quality=100, subsampling=0)
    assert Image.open(io.BytesIO(encoded)).mode == mode
    found = images.decode(encoded, 64, lambda *size: (0, 0, *size)).astype(int)
    # The loss of JPEG itself.
    assert np.abs(found - np.asarray(expected)).max() <= 6


def test_a_palette_becomes_rgb():
    pixels, encoded = Image.fromarray(smooth(64, 64)).quantize(16), io.BytesIO()
    pixels.save(encoded, "png")
    found = images.decode(encoded.getvalue(), 64, lambda *size: (0, 0, *size))
    np.testing.assert_array_equal(found, np.asarray(pixels.convert("RGB")))


@pytest.mark.parametrize("batch_size", [1, 4, 22, 30])
def test_evaluation_has_every_example_once_in_order(records, batch_size):
    found = list(evaluate(records, batch_size=batch_size))
    assert len(found) == -(-COUNT // batch_size)
    assert counted(found) == list(range(COUNT))
    for batch in found:
        assert batch.images.shape == (batch_size, SIZE, SIZE, 3)
        assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int32)
        assert not batch.bad.any()
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


# Training


def test_epochs_are_different_orders_of_all_examples(records):
    found = counted(first(33, train(records, batch_size=2)))
    epochs = [found[i * COUNT : (i + 1) * COUNT] for i in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    others = counted(first(33, train(records, batch_size=2, seed=1)))
    epochs += [others[i * COUNT : (i + 1) * COUNT] for i in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert list(range(COUNT)) not in epochs


def test_an_example_is_cut_out_anew_in_every_epoch(records):
    batch = first(1, train(records, batch_size=2 * COUNT))[0]
    for label in range(COUNT):
        one, other = batch.images[batch.labels == label]
        assert not np.array_equal(one, other)


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
        def __getitem__(self, index):
            read.append(index)
            return records.data[index]

    next(train(records._replace(data=Spy()), batch_size=4, first_step=10**6))
    assert len(read) == 4


def boxes(width, height, count=4000):
    rng = np.random.default_rng(0)
    return np.array([images.random_box(rng, width, height) for _ in range(count)]).T


def test_random_boxes_are_uniform_in_area_aspect_and_place():
    left, upper, right, lower = boxes(1000, 1000)
    across, down = right - left, lower - upper
    area = across * down / 1e6
    # Of up to 3/4 of a square's area every aspect fits, so that none is drawn again.
    free = area < 0.75
    least, span = 0.08, 0.75 - 0.08
    assert stats.kstest(area[free], "uniform", (least, span)).pvalue > 0.01
    aspect = np.log(across / down)[free]
    most = np.log(4 / 3)
    assert stats.kstest(aspect, "uniform", (-most, 2 * most)).pvalue > 0.01
    for start, length in ((left, across), (upper, down)):
        place = start[free] / (1000 - length[free])
        assert stats.kstest(place, "uniform").pvalue > 0.01
    assert area.max() > 0.97


@pytest.mark.parametrize(("width", "height"), [(500, 375), (40, 1000), (3, 2), (1, 1)])
def test_random_boxes_lie_inside(width, height):
    left, upper, right, lower = boxes(width, height, 500)
    assert (left >= 0).all()
    assert (upper >= 0).all()
    assert (right <= width).all()
    assert (lower <= height).all()
    assert (np.minimum(right - left, lower - upper) > 0).all()


def test_a_box_that_never_fits_is_the_centre():
    expected = np.tile(images.centre_box(1000, 10), (100, 1))
    np.testing.assert_array_equal(boxes(1000, 10, 100).T, expected)


def test_half_of_the_images_are_mirrored():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:] = np.arange(0, 256, 8)[:, None]
    encoded, rng = tiny.jpeg(pixels), np.random.default_rng(0)
    found = [images.for_training(encoded, 8, rng) for _ in range(1000)]
    mirrored = sum(image[4, 0, 0] > image[4, -1, 0] for image in found)
    assert stats.binomtest(int(mirrored), 1000).pvalue > 0.01


# Bad input

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
    good = [0, 1, 2, 4, 5]
    found = list(evaluate(records, batch_size=4, max_bad_examples=1))
    assert counted(found) == good
    assert (
        np.concatenate([batch.bad for batch in found]).tolist()
        == [False] * 3 + [True] + [False] * 4
    )
    assert not found[0].images[3].any()
    # Once, however often it is met.
    assert counted(first(6, train(records, batch_size=6, max_bad_examples=1))).count(3) == 0
    for mode in (train, evaluate):
        with pytest.raises(UserError) as error:
            first(6, mode(records, batch_size=4))
        message = str(error.value)
        assert "1 broken" in message
        assert "imagenet2012 train, example 3 (n00000003_03.JPEG)" in message
        assert "Error" in message
        assert "max_bad_examples (now 0)" in message
        assert "\n" not in message


def test_broken_images_are_counted_over_all_batches(opened):
    bad = [EXAMPLES[i]._replace(image=b"") for i in (1, 3, 5)]
    records = opened([EXAMPLES[0], bad[0], EXAMPLES[2], bad[1], EXAMPLES[4], bad[2]])
    assert counted(evaluate(records, batch_size=2, max_bad_examples=3)) == [0, 2, 4]
    iterator = evaluate(records, batch_size=2, max_bad_examples=2)
    assert len(first(2, iterator)) == 2
    with pytest.raises(UserError, match=r"3 broken images, the last of them .* example 5 "):
        next(iterator)
    with pytest.raises(UserError, match=r"1 broken images, the last of them .* example 5 "):
        list(evaluate(records, batch_size=2, first_step=2))


@pytest.mark.parametrize("label", [-1, 1000])
def test_a_label_that_is_no_class(opened, label):
    records = opened(with_third(label=label))
    with pytest.raises(UserError, match=rf"example 3 \(n0.*\) has the label {label} of 1000"):
        list(evaluate(records, batch_size=2, max_bad_examples=9))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "it is missing"),
        (lambda path: path.write_bytes(b""), "0 of 3 examples"),
        (lambda path: path.write_bytes(path.read_bytes()[:70_000]), "0 of 3 examples"),
    ],
)
def test_a_file_that_is_missing_or_truncated(tmp_path, damage, reason):
    folder = tiny.write(tmp_path, {"train": EXAMPLES[:6]}, shards=2)
    damage(path := folder / "imagenet2012-train.array_record-00001-of-00002")
    with pytest.raises(UserError) as error:
        open_split("imagenet2012", str(tmp_path), "train")
    message = str(error.value)
    assert f"damaged file {path} ({reason})" in message
    assert "download_and_prepare" in message


def test_a_file_that_is_damaged_inside(tmp_path):
    folder = tiny.write(tmp_path, {"train": EXAMPLES[:6]}, shards=2)
    path = folder / "imagenet2012-train.array_record-00001-of-00002"
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    records = open_split("imagenet2012", str(tmp_path), "train")
    with pytest.raises(UserError) as error:
        list(evaluate(records, batch_size=3))
    assert f"damaged file {path} (RuntimeError: Corrupted" in str(error.value)


def test_a_set_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match=r"not prepared in .*download_and_prepare\(\)"):
        open_split("imagenet2012", str(tmp_path), "train")


def test_a_set_for_tensorflow_alone(tmp_path):
    folder = tiny.write(tmp_path, {"train": EXAMPLES[:1]}, shards=1)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=f"prepared as tfrecord in {folder}"):
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


@pytest.mark.parametrize("split", ["train[", "train[x]", "train[:0]"])
def test_parts_that_are_none(data_dir, split):
    with pytest.raises(UserError, match="imagenet2012"):
        open_split("imagenet2012", data_dir, split)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": handwritten.image(4, 5, 3)}, "features image: Image: an image class"),
        (
            {"image": handwritten.image(4, 5, 1), "label": handwritten.label(3)},
            r"images of shape \(4, 5, 1\): this needs 3 channels",
        ),
        (
            {"image": handwritten.TEXT, "label": handwritten.label(3)},
            "features image: Text, label: ClassLabel: an image class",
        ),
    ],
)
def test_features_that_are_missing(tmp_path, features, message):
    splits = {"train": handwritten.examples(4, 0)}
    handwritten.write(tmp_path, "tiny/1.0.0", splits, features)
    with pytest.raises(UserError, match=message):
        open_split("tiny", str(tmp_path), "train")


@pytest.mark.parametrize(("batch_size", "processes"), [(5, 2), (0, 1), (-3, 3)])
def test_a_batch_that_does_not_divide(records, batch_size, processes):
    with pytest.raises(UserError, match=f"batch_size {batch_size}: .* {processes} processes"):
        train(records, batch_size=batch_size, process_count=processes)


# To the device


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_one_batch_is_ahead_on_the_device(count):
    put = []

    def note(i):
        put.append(i)
        return i * 10

    iterator = to_device(range(count), note)
    for i in range(count):
        assert next(iterator) == i * 10
        assert put == list(range(min(i + 2, count)))
    assert next(iterator, None) is None


# Worker processes, which take seconds to start


def test_workers_change_nothing_and_tell_what_is_wrong(records, opened):
    # An epoch has more than these 20 examples: the last of them is met once.
    expected = first(5, train(records, batch_size=4))
    last = int(expected[-1].labels[-1])
    wrong = [e._replace(label=-1) if e.label == last else e for e in EXAMPLES]
    iterator = train(opened(wrong), batch_size=4, workers=2, first_step=1)
    assert all(map(equal, first(3, iterator), expected[1:4]))
    with pytest.raises(UserError, match=rf"^[^\n]*, example {last} [^\n]* label -1 [^\n]*$"):
        next(iterator)
    assert multiprocessing.active_children() == []


def test_a_worker_that_has_died():
    class Died:
        def __iter__(self):
            return self

        def __next__(self):
            raise RuntimeError("Worker process was terminated. Search the logs above")

        def close(self):
            pass

    with pytest.raises(UserError, match=r"failed \(Worker process was terminated\): if memory"):
        next(imagenet._watched(Died(), None, 0, 0))


def test_a_worker_ends_with_its_parent(monkeypatch):
    """Which grain's do not when the parent is killed: they would wait for it for ever."""
    killed, ended = threading.Event(), threading.Event()
    parent = SimpleNamespace(join=killed.wait)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    imagenet._end_with_parent(0, 1)
    assert not ended.wait(0.1)
    killed.set()
    assert ended.wait(10)
