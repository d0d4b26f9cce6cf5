import handwritten
import pytest

TRAIN, TEST = handwritten.examples(10, seed=0), handwritten.examples(4, seed=1)


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def prepare(data_dir):
    """`prepare("tiny/1.0.0", ...)` writes a set of 10 and 4 examples; returns its folder."""

    def build(path="tiny/1.0.0", *, splits=None, **options):
        splits = {"train": TRAIN, "test": TEST} if splits is None else splits
        return handwritten.write(data_dir, path, splits, **options)

    return build
