"""Data that a user brings."""

import numpy as np
import pytest
from test_originals import write_mnist

from bn_jax.errors import UserError
from bn_jax.lab.data import load
from bn_jax.lab.data.given import from_arrays, from_file

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(50, 3)), np.arange(50) % 4
X_TEST, Y_TEST = RNG.normal(size=(8, 3)), np.arange(8) % 4
WHOLE_PAIRS = (X, Y), (X_TEST, Y_TEST)
WHOLE = {"x_train": X, "y_train": Y, "x_test": X_TEST, "y_test": Y_TEST}


@pytest.mark.parametrize(
    "data", [WHOLE, WHOLE_PAIRS, [[X.tolist(), Y.tolist()], [X_TEST, Y_TEST]]]
)
def test_arrays_in_each_form(data):
    arrays = from_arrays(data)
    np.testing.assert_array_equal(arrays.train_inputs, np.float32(X))
    np.testing.assert_array_equal(arrays.test_labels, Y_TEST)
    assert (arrays.num_classes, arrays.validation, arrays.note) == (4, None, "")
    np.testing.assert_allclose(arrays.std, X.std(0), 1e-6)


def test_a_file_is_its_arrays(tmp_path):
    np.savez(tmp_path / "mine.npz", **WHOLE, x_validation=X[:5], y_validation=Y[:5])
    arrays = from_file(tmp_path / "mine.npz")
    np.testing.assert_array_equal(arrays.train_inputs, np.float32(X))
    np.testing.assert_array_equal(arrays.validation[1], Y[:5])


def test_without_a_test_split_a_fifth_becomes_one():
    arrays = from_arrays((X, Y))
    assert (len(arrays.train_labels), len(arrays.test_labels)) == (40, 10)
    both = np.concatenate([arrays.train_inputs, arrays.test_inputs])
    np.testing.assert_array_equal(np.sort(both, 0), np.sort(np.float32(X), 0))
    assert arrays.note.startswith("10 ")
    again = from_arrays({"x_train": X, "y_train": Y})
    np.testing.assert_array_equal(arrays.test_inputs, again.test_inputs)


def test_types():
    bytes_, tokens = RNG.integers(0, 256, (50, 4, 4, 1), np.uint8), RNG.integers(0, 9, (50, 6))
    assert from_arrays((bytes_, Y)).train_inputs.dtype == np.uint8
    assert from_arrays((tokens, Y)).train_inputs.dtype == np.int32
    assert from_arrays((X > 0, Y)).train_inputs.dtype == np.uint8
    numbers = from_arrays((X, X.sum(1)))
    assert (numbers.num_classes, numbers.train_labels.dtype) == (0, np.float32)
    column = from_arrays((X, Y[:, None]))  # as Keras has CIFAR-10
    assert (column.num_classes, column.train_labels.ndim) == (4, 1)


def bad(value, at=3):
    changed = X.copy()
    changed[at] = value
    return changed


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"x_train": X}, "no y_train"),
        ({"images": X, "labels": Y}, "no x_train but images, labels"),
        ({**WHOLE, "y_test": Y}, "x_test has 8 examples and y_test 50"),
        ((X[:0], Y[:0]), "at least one"),
        ((X[:2], Y[:2]), "2 examples: too few"),
        ((bad(np.nan), Y), "x_train has 1 examples that are not finite.*example 3"),
        ((bad(1e39), Y), "not finite in float32"),
        ((X, Y - 1), "label -1"),
        ((X, Y * 100), "label 300 in 40 examples"),
        (
            {**WHOLE, "y_test": Y_TEST + 1},
            "y_test has the label 4, the largest",
        ),
        ({**WHOLE, "x_test": X_TEST[:, :2]}, r"x_train is float32 \[50, 3\] and x_test"),
        ({**WHOLE, "y_test": Y_TEST / 2}, "y_train is int32.*y_test float32"),
        ((Y, Y), "x_train is int32"),
        ((X, np.eye(4, dtype=int)[Y]), "make numbers floats"),
        ((X, np.full(50, "a")), "y_train is of <U1"),
        ((X.astype(object), Y), "x_train is of object"),
        (X, "is a ndarray"),
        (7, "is a int"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(data, said):
    with pytest.raises(UserError, match=said) as raised:
        from_arrays(data, "mine")
    assert str(raised.value).startswith("mine")
    assert "\n" not in str(raised.value)


class Trap:
    def __reduce__(self):
        return print, ("called",)


def test_files_that_are_no_such_arrays_are_refused(tmp_path, capsys):
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=np.array([Trap()], object), y_train=Y)
    with pytest.raises(UserError, match="pickled objects, which are never loaded"):
        from_file(path)
    assert "called" not in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        from_file(path)
    path.write_text("x, y")
    with pytest.raises(UserError, match=r"mine\.npz"):
        from_file(path)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(UserError, match="one array"):
        from_file(tmp_path / "one.npy")


def sizes(dataset):
    return [s.labels.size for s in (dataset.train, dataset.validation, dataset.test)]


def test_load_takes_arrays_functions_and_files(tmp_path):
    np.savez(tmp_path / "mine.npz", **WHOLE, x_validation=X[:5], y_validation=Y[:5])
    for data in (
        str(tmp_path / "mine.npz"),
        {**WHOLE, "x_validation": X[:5], "y_validation": Y[:5]},
    ):
        dataset = load(data)
        assert [s.labels.size for s in (dataset.train, dataset.validation, dataset.test)] == [
            50,
            5,
            8,
        ]
        scaled = dataset.scaled(dataset.train.inputs)
        np.testing.assert_allclose(scaled, (X - X.mean(0)) / X.std(0), 1e-4, 1e-5)
    said = []
    dataset = load(lambda: (X, X.sum(1)), say=said.append)
    assert [s.labels.size for s in (dataset.train, dataset.validation, dataset.test)] == [
        32,
        8,
        10,
    ]
    assert dataset.num_classes == 0
    assert "10 random examples are its test split" in said[0]


def test_tokens_are_not_scaled():
    tokens = RNG.integers(0, 300, (50, 6))
    dataset = load(
        {"x_train": tokens, "y_train": Y, "x_test": tokens[:5], "y_test": Y[:5]},
        validation_fraction=0,
    )
    np.testing.assert_array_equal(dataset.scaled(dataset.train.inputs), tokens)


def test_the_authors_files_are_taken_where_tensorflow_datasets_has_none(tmp_path):
    written = write_mnist(tmp_path / "mnist", packed=True)
    for _ in range(2):  # decoded, then cached
        dataset = load(
            "mnist",
            data_dir=str(tmp_path),
            cache_dir=str(tmp_path / "cache"),
            validation_fraction=0,
        )
        np.testing.assert_array_equal(dataset.train.inputs, written["train"])
