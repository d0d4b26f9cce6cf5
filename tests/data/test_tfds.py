"""Sets of tensorflow-datasets, handwritten and small; nothing here needs the network."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import handwritten
import numpy as np
import pytest

from bn_jax.data import load, tfds
from bn_jax.errors import UserError

ROOT = Path(__file__).parents[2]
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


def test_images_keep_their_labels(prepare, load_it):
    prepare()
    dataset = load_it("tiny")
    known = {bytes(image): number for image, number in zip(TRAIN, TRAIN_LABELS, strict=True)}
    for split in (dataset.train, dataset.validation):
        for image, number in zip(split.inputs, split.labels, strict=True):
            assert known[bytes(np.asarray(image))] == number


@pytest.mark.parametrize("name", ["tiny", "tiny:1.0.0", "tiny:1.*.*"])
def test_versions(prepare, load_it, name):
    prepare()
    assert load_it(name).num_classes == 3


def test_the_newest_of_two_versions(prepare, load_it):
    prepare()
    prepare("tiny/2.0.0", splits={"train": FEWER, "test": (TEST, TEST_LABELS)})
    sizes = [len(together(load_it(name))) for name in ("tiny", "tiny:1.0.0", "tiny:2.0.0")]
    assert sizes == [6, 10, 6]


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


def test_the_files_of_another_config_do_not_count(prepare, data_dir):
    prepare("tiny/small/1.0.0")
    source = tfds.Source("tiny/small", data_dir)
    before = source.fingerprint()
    prepare("tiny/large/1.0.0")
    assert source.fingerprint() == before != ""
    assert tfds.Source("tiny/..", data_dir).fingerprint() == ""
    assert len(tfds.Source("tiny", data_dir).fingerprint().split("\n")) == 8


def test_a_cache_travels_without_its_set(prepare, data_dir, load_it, monkeypatch):
    """The last that was cached, and it is said; nothing of tensorflow-datasets is needed."""
    folder = prepare()
    first, said = load_it("tiny"), []
    shutil.rmtree(folder.parent)
    monkeypatch.setattr(tfds, "read", None)
    again = load_it("tiny", say=said.append)
    assert labels_of(again) == labels_of(first)
    (text,) = said
    assert text.startswith(f"tiny is not prepared in {data_dir}: taken from the cache, ")


def test_a_set_has_one_spelling(prepare, refusal):
    prepare()
    assert "lower case" in refusal("TINY")


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


@pytest.mark.parametrize("name", ["", "../x", "mnist/", "a b"])
def test_names_that_are_none_are_told_what_a_name_is(refusal, name):
    assert "circles, digits" in refusal(name)


def test_arguments_in_a_name(refusal):
    assert "mnist/shuffle=True" in refusal("mnist/shuffle=True")


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


def test_the_command_for_a_folder_with_an_apostrophe(tmp_path):
    with pytest.raises(UserError) as error:
        load("mnist", data_dir=str(tmp_path / "o'clock"), cache_dir=str(tmp_path / "cache"))
    program = shlex.split(str(error.value).split(" && ")[1])[2]
    compile(program, "command", "exec")


def test_an_unknown_version(refusal):
    message = refusal("mnist:9.9.9")
    assert "'mnist:9.9.9'" in message
    assert "only: 3.0.1" in message


def test_an_unknown_config(refusal):
    assert "'mnist/nope'" in refusal("mnist/nope")


def test_an_unknown_config_in_a_sentence_that_ends(refusal):
    assert not refusal("mnist/nope").endswith(":")


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


def test_a_config_for_tensorflow_alone(data_dir, prepare, refusal):
    prepare("tiny/small/1.0.0", file_format="tfrecord")
    assert f"builder('tiny/small', data_dir='{data_dir}'," in refusal("tiny/small")


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


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_damaged_features(prepare, refusal, text):
    (prepare() / "features.json").write_text(text)
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


def test_the_environment_names_the_folder(prepare, data_dir, cache_dir, monkeypatch):
    prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert load("tiny", cache_dir=str(cache_dir)).num_classes == 3


FROM_THE_CACHE = """
import json, sys
from bn_jax.data import load
dataset = load("tiny", data_dir=sys.argv[1], cache_dir=sys.argv[2])
heavy = [m for m in sys.modules if m.startswith(("tensorflow", "tensorflow_datasets"))]
print(json.dumps([dataset.test.labels.tolist(), heavy]))
"""


def test_a_later_process_reads_the_cache_alone(prepare, data_dir, cache_dir, load_it):
    prepare()
    load_it("tiny")
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_CACHE, str(data_dir), str(cache_dir)],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    labels, heavy = json.loads(done.stdout)
    assert labels == TEST_LABELS.tolist()
    assert heavy == []
    assert done.stderr == ""
