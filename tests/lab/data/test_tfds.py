"""Sets of tensorflow-datasets, handwritten and small; nothing here needs the network."""

import os
import shlex
import shutil
import socket
from pathlib import Path

import handwritten
import numpy as np
import pytest

from bn_jax.errors import UserError
from bn_jax.lab.data import load, tfds

(TRAIN, TRAIN_LABELS), (TEST, TEST_LABELS) = (
    handwritten.examples(10, seed=0),
    handwritten.examples(4, seed=1),
)
FEWER = handwritten.examples(6, seed=2)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def load_it(data_dir, cache_dir):
    """`load(name)` with a data_dir and cache_dir of this test."""
    where = {"data_dir": str(data_dir), "cache_dir": str(cache_dir)}

    def call(name, **options):
        return load(name, **(where | options))

    return call


@pytest.fixture
def refusal(data_dir, cache_dir, load_it):
    """`refusal(name)` is the message of the UserError; nothing has been written."""

    def call(name):
        before = sorted(data_dir.rglob("*"))
        with pytest.raises(UserError) as error:
            load_it(name)
        assert sorted(data_dir.rglob("*")) == before
        assert not any(cache_dir.glob("*"))
        return str(error.value)

    return call


def together(dataset):
    """Training and validation inputs as a sorted list of bytes."""
    parts = (dataset.train.inputs, dataset.validation.inputs)
    return sorted(bytes(np.asarray(image)) for part in parts for image in part)


def test_a_prepared_set_is_read(prepare, load_it):
    prepare()
    dataset = load_it("tiny")
    assert together(dataset) == sorted(bytes(image) for image in TRAIN)
    np.testing.assert_array_equal(dataset.test.inputs, TEST)
    np.testing.assert_array_equal(dataset.test.labels, TEST_LABELS)
    assert dataset.num_classes == 3
    assert dataset.train.inputs.shape == (8, 4, 5, 3)
    assert dataset.train.inputs.dtype == np.uint8


@pytest.mark.parametrize("name", ["tiny", "tiny:1.0.0", "tiny:1.*.*"])
def test_versions(prepare, load_it, name):
    prepare()
    assert load_it(name).num_classes == 3


def test_a_config(prepare, load_it):
    prepare("tiny/small/1.0.0")
    prepare(
        "tiny/large/1.0.0",
        splits={"train": handwritten.examples(20, 2), "test": (TEST, TEST_LABELS)},
    )
    sizes = [len(together(load_it(f"tiny/{config}"))) for config in ("small", "large")]
    assert sizes == [10, 20]


def test_validation_is_the_test_set_where_there_is_no_other(prepare, load_it):
    prepare(splits={"train": (TRAIN, TRAIN_LABELS), "validation": (TEST, TEST_LABELS)})
    np.testing.assert_array_equal(load_it("tiny").test.inputs, TEST)


def test_a_set_that_is_prepared_anew_is_read_anew(prepare, load_it):
    folder = prepare()
    load_it("tiny")
    shutil.rmtree(folder)
    prepare(splits={"train": FEWER, "test": (TEST, TEST_LABELS)})
    assert len(together(load_it("tiny"))) == 6


def labels_of(dataset):
    return np.asarray(dataset.test.labels).tolist()


def test_a_set_that_is_mended_in_place_is_read_anew(prepare, data_dir, load_it):
    """Only labels differ: sizes do not, and times may be those of an archive."""
    folder, times = prepare(), {}
    for path in folder.iterdir():
        times[path.name] = path.stat()
    load_it("tiny")
    shutil.rmtree(folder)
    prepare(splits={"train": (TRAIN, TRAIN_LABELS), "test": (TEST, TEST_LABELS[::-1])})
    for path in folder.iterdir():
        old = times[path.name]
        assert path.stat().st_size == old.st_size
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert labels_of(load_it("tiny")) == TEST_LABELS[::-1].tolist()


def test_a_copy_is_not_decoded_again(prepare, data_dir, load_it, monkeypatch):
    for path in prepare().iterdir():
        os.utime(path, (1, 1))
    load_it("tiny")
    shutil.copytree(data_dir, data_dir.with_name("copy"), copy_function=shutil.copyfile)
    monkeypatch.setattr(tfds, "read", None)
    assert load_it("tiny", data_dir=data_dir.with_name("copy")).num_classes == 3


def test_unknown_sets(data_dir, refusal):
    message = refusal("no_such_set")
    assert "unknown dataset 'no_such_set'" in message
    assert "circles, digits" in message
    assert not data_dir.exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/", "mnist/", "mnist:", "a b", "é", "a\nb"]
)
def test_names_that_are_none(data_dir, refusal, name):
    assert repr(name) in refusal(name)
    assert not data_dir.exists()


@pytest.mark.parametrize("name", ["..", "../other", "/", ""])
def test_files_of_no_set_are_not_looked_at(prepare, data_dir, name):
    prepare()
    (data_dir.parent / "other").mkdir()
    (data_dir.parent / "other" / "file").touch()
    with pytest.raises(UserError, match="unknown dataset"):
        tfds.Source(name, data_dir).fingerprint()


def test_a_known_set_that_is_not_prepared(data_dir, refusal):
    message = refusal("mnist")
    assert f"'mnist' is not prepared in {data_dir}" in message
    shell, code = message.split(": ", 1)[1].split(" && ")
    assert shell == "pip install tensorflow importlib_resources"
    python, option, program = shlex.split(code)
    assert (python, option) == ("python", "-c")
    compile(program, "command", "exec")
    assert "'mnist'" in program
    assert f"data_dir='{data_dir}'" in program
    assert "array_record" in program
    assert not data_dir.exists()


@pytest.mark.parametrize("name", ["tiny:9.9.9", "tiny/nope"])
def test_another_version_than_the_prepared(prepare, refusal, name):
    prepare()
    assert "1.0.0" in refusal(name)


@pytest.mark.parametrize(
    ("features", "found"),
    [
        ({"text": handwritten.TEXT, "label": handwritten.label(3)}, "text: Text"),
        ({"image": handwritten.image(4, 5, 3)}, "image: Image"),
        ({"image": handwritten.image(4, 5, 3), "label": handwritten.TEXT}, "label: Text"),
        ({"image": handwritten.TEXT, "label": handwritten.label(3)}, "image: Text"),
    ],
)
def test_what_is_no_image_classification_set(prepare, refusal, features, found):
    prepare(features=features)
    message = refusal("tiny")
    assert found in message
    assert "an image classification set has 'image' (Image) and 'label' (ClassLabel)" in message


@pytest.mark.parametrize("shape", [(-1, -1, 3), (4, -1, 3)])
def test_images_of_many_sizes(prepare, refusal, shape):
    prepare(features=handwritten.GOOD | {"image": handwritten.image(*shape)})
    message = refusal("tiny")
    assert "None" in message
    assert "one size" in message


def test_a_set_for_tensorflow_alone(data_dir, prepare, refusal):
    folder = prepare(file_format="tfrecord")
    message = refusal("tiny")
    assert f"prepared as tfrecord in {folder}" in message
    assert "delete that folder" in message
    assert f"builder('tiny', data_dir='{data_dir}', file_format='array_record')" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_that_is_missing(prepare, refusal, split):
    prepare(splits={split: (TRAIN, TRAIN_LABELS)})
    message = refusal("tiny")
    assert f"has the splits {split}" in message
    assert "needs train" in message


def cut(path):
    path.write_bytes(path.read_bytes()[:70_000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 255
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, empty, cut, flip])
def test_a_damaged_file_of_records(prepare, refusal, damage):
    file = "tiny-train.array_record-00000-of-00001"
    damage(prepare() / file)
    assert "tiny" in refusal("tiny")


@pytest.mark.parametrize("text", ["", "{", "3"])
def test_damaged_metadata(prepare, refusal, text):
    (prepare() / "dataset_info.json").write_text(text)
    assert "tiny" in refusal("tiny")


def test_images_of_another_shape_than_stated(prepare, refusal):
    prepare(features=handwritten.GOOD | {"image": handwritten.image(5, 5, 3)})
    assert "tiny" in refusal("tiny")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1] * 4, "4 labels that are none of the 3 classes, the first is -1 of example 0"),
        ([0, 1, 2, 3], "1 labels that are none of the 3 classes, the first is 3 of example 3"),
    ],
)
def test_labels_that_are_no_class(prepare, refusal, labels, message):
    prepare(splits={"train": (TRAIN, TRAIN_LABELS), "test": (TEST, labels)})
    assert message in refusal("tiny")


def test_pixels_that_are_not_finite(prepare, refusal, monkeypatch):
    """Sets of floating-point images may have some."""
    prepare()
    decode = tfds._decode

    def damaged(source, builder, split):
        images, labels = decode(source, builder, split)
        images = images.astype(np.float32)
        images[1, 2, 3, 0] = np.nan
        images[3, 0, 0, 1] = np.inf
        return images, labels

    monkeypatch.setattr(tfds, "_decode", damaged)
    message = "train has 2 images with pixels that are not finite, the first is example 1"
    assert message in refusal("tiny")


def test_where_sets_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert tfds.resolve_data_dir(None) == tmp_path / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    assert tfds.resolve_data_dir(None) == tmp_path / "there"
    assert tfds.resolve_data_dir("~/given") == tmp_path / "given"
