"""The benchmark of folding, whole."""

from benchmarks import fold
from bn_jax.report.text import padded


def test_rows_of_every_network(capsys):
    found = fold.run(fold.Config(batch_sizes=(1,), rounds=1))
    lines = [r.split(" | ") for r in capsys.readouterr().out.splitlines() if r[:2] == "| "]
    rows = {(cells[0][2:], cells[2]): cells for cells in lines[2:]}
    assert len(rows) == len(lines) - 2 == 3 * len(fold.MODELS)
    for name, (one,) in found.items():
        assert min(one[1:]) > 0
        assert one.difference < 1e-5
        # Of one round: the ratios are those of the times.
        assert one.to_without == one.milliseconds / one.without_milliseconds
        assert rows[name, "with BatchNorm"][3] == padded(one.unfolded_milliseconds)
        assert rows[name, "with BatchNorm"][4] == f"{one.unfolded_to_without:.2f}"
        assert rows[name, "without"][4] == "1.00"
