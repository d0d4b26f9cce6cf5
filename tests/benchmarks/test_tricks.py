import pytest

from benchmarks import tricks


@pytest.mark.long
def test_gains(monkeypatch, capsys):
    monkeypatch.setattr(tricks, "CNN", tricks.CNN._replace(images=8, batch=4))
    sizes = {"shape": (4, 4, 4, 2), "small": 2, "width": 4, "features": (2, 3, 2)}
    config = tricks.Config(**sizes, runs=2, epochs=2, steps=2, batch=4, rounds=1)
    gains = tricks.run(config)
    assert all(gain > 0 for gain in gains.values())
    rows = [r for r in capsys.readouterr().out.splitlines() if r.startswith("| ")]
    assert len(rows) == 2 + len(gains) > 2 + 14  # none hides another of its name
