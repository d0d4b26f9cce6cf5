import pytest

from benchmarks import scaling


@pytest.mark.long
def test_tables_and_figure(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scaling.Size.__new__, "__defaults__", (4, 4, 1, 1))
    config = scaling.Config(doublings=1, steps=2, rounds=1, figure=str(tmp_path / "s.png"))
    found = scaling.run(config)
    assert {name: list(rows) for name, rows in found.items()} == {
        "batch": [4, 8], "width": [4, 8], "runs": [1, 2], "layers": [1, 2],
    }  # fmt: skip
    for rows in found.values():
        small, large = rows.values()
        assert 0 < small.memory < large.memory
        assert small.seconds > 0
    assert capsys.readouterr().out.count("| growth |") == 4
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_growth_is_the_exponent():
    rows = {v: scaling.Measured(3.0 * v, v * v) for v in (1, 2, 4)}
    assert scaling.growth(rows, "seconds") == pytest.approx(1)
    assert scaling.growth(rows, "memory") == pytest.approx(2)
