"""The cache of decoded arrays: it gives back what was built, or says what is wrong."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from bn_jax.errors import UserError
from bn_jax.lab.data import cache
from bn_jax.lab.data.arrays import Arrays

FILES = ["meta.json", *(f"{name}.npy" for name in cache.ARRAYS)]


def build(seed=0, examples=40):
    pixels = np.random.default_rng(seed).integers(0, 256, (examples + 6, 3, 4, 2))
    labels = np.arange(examples + 6) % 5
    pixels = pixels.astype(np.uint8)
    return Arrays.create(
        pixels[:examples], labels[:examples], pixels[examples:], labels[examples:], 5
    )


def never():
    pytest.fail("built although it was in the cache")


def cached(folder, fingerprint="files", build=build, name="set/config:1.0.0"):
    return cache.cached(name, fingerprint, folder, build)


def assert_same(ours, theirs):
    for name, a, b in zip(Arrays._fields, ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.fixture
def entry(tmp_path):
    """The folder of the only entry of a cache at `tmp_path`."""
    cached(tmp_path)
    (folder,) = tmp_path.iterdir()
    return folder


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_comes_back_is_what_was_built(tmp_path):
    for arrays in (cached(tmp_path), cached(tmp_path, build=never)):
        assert_same(arrays, build())
        assert type(arrays.num_classes) is int
        assert arrays.train_inputs.dtype == np.uint8
        assert arrays.train_labels.dtype == np.int32


def test_another_fingerprint_is_built_again(tmp_path):
    cached(tmp_path, "old")
    assert_same(cached(tmp_path, "new", lambda: build(1)), build(1))
    assert_same(cached(tmp_path, "old", never), build())


def test_the_measured_statistics_are_those_of_each_channel():
    arrays = build()
    pixels = arrays.train_inputs.astype(np.float64)
    np.testing.assert_allclose(arrays.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(arrays.std, pixels.std((0, 1, 2)), rtol=1e-12)
    assert arrays.peak == pixels.max()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def headless(path):
    path.write_bytes(path.read_bytes()[:20])


def emptied(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"\xff\x00 no such format" * 9)


def flipped(path):
    flip(path, len(path.read_bytes()) - 3)


DAMAGES = [truncated, headless, emptied, garbage, flipped, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_refused(tmp_path, entry, file, damage):
    damage(entry / file)
    with pytest.raises(UserError, match="delete") as error:
        cached(tmp_path, build=never)
    assert str(entry) in str(error.value)


@pytest.mark.parametrize("text", ["{}", "[]", '{"crc32": {}}', '{"crc32": 3}'])
def test_other_json_is_refused(tmp_path, entry, text):
    (entry / "meta.json").write_text(text)
    with pytest.raises(UserError, match="delete"):
        cached(tmp_path, build=never)


def test_the_newest_entry_of_a_name(tmp_path):
    for name, fingerprint, time in (
        ("a", "1", 10), ("a", "2", 30), ("a", "3", 20), ("a/b", "1", 40), ("a-b", "1", 50)
    ):  # fmt: skip
        before = set(tmp_path.iterdir())
        cached(tmp_path, fingerprint, lambda f=fingerprint: build(int(f)), name)
        (made,) = set(tmp_path.iterdir()) - before
        os.utime(made, (time, time))
    (tmp_path / ".a-0123456789ab.cd").mkdir()  # unfinished
    assert_same(cache.mapped(cache.newest("a", tmp_path)), build(2))
    assert cache.newest("a/b", tmp_path).name.startswith("a%2Fb-")
    assert cache.newest("b", tmp_path) is None
    assert cache.newest("a", tmp_path / "nowhere") is None


def test_nothing_is_left_where_building_fails(tmp_path):
    def fail():
        raise UserError("not prepared")

    with pytest.raises(UserError, match="not prepared"):
        cached(tmp_path / "cache", build=fail)
    assert not list(tmp_path.rglob("*.npy"))
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("interruption", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", range(4))
def test_nothing_is_left_where_writing_ends_early(tmp_path, monkeypatch, after, interruption):
    save, count = np.save, iter(range(9))

    def fail(path, array):
        if next(count) == after:
            Path(path).write_bytes(b"half")
            raise interruption
        save(path, array)

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(type(interruption)):
        cached(tmp_path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    assert_same(cached(tmp_path), build())


def test_a_cache_that_cannot_be_written_is_known_before_anything_is_decoded(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises((OSError, UserError), match="file"):
        cached(tmp_path / "file" / "cache", build=never)


def test_two_threads_may_build_one_entry(tmp_path):
    both_build, results = threading.Barrier(2), []

    def slow():
        both_build.wait(timeout=30)
        return build(examples=4000)

    def work():
        results.append(cached(tmp_path, build=slow))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert_same(results[0], results[1])
    assert len(os.listdir(tmp_path)) == 1


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / "bn_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / ".cache" / "bn_jax"
