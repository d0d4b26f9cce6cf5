"""The benchmark of folding, whole."""

from benchmarks import fold


def test_rows_of_every_network():
    rows = fold.run(fold.Config(batch_sizes=(1,), rounds=1))
    assert len(rows) == 3 * len(fold.MODELS)
    assert all(row["seconds"] > 0 for row in rows)
