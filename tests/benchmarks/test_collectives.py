import itertools

import pytest

from benchmarks import collectives
from benchmarks.collectives import Case, Exchanged, exchanged


@pytest.fixture
def table(monkeypatch, capsys):
    """The rows that the program prints for one and two devices, of a tiny network."""
    monkeypatch.setattr(collectives, "FEATURES", (2, 3))
    monkeypatch.setattr(collectives.jax.config, "update", lambda *_: None)  # it has started
    collectives.run(collectives.Config(devices=(1, 2), batch=8, rounds=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.long
def test_what_is_printed(table):
    found = {(row[0], row[1], row[2]): row[3:] for row in table}
    assert len(found) == len(collectives.cases([1, 2])) == 8
    assert found["1", "jit", "whole batch"][:2] == ["-", "-"]
    # Two norms: one all-reduce of the gradients, and three for each that is shared.
    for engine in ("pmap", "shard_map"):
        assert found["2", engine, "whole batch"][0] == "7"
    assert found["2", "pmap", "none"][0] == found["2", "pmap", "a device"][0] == "1"
    assert all(float(row[5].replace(",", "")) > 0 for row in table)


def test_bytes_are_those_of_parameters_and_metrics():
    step, _ = collectives.compiled(Case("pmap", 2, "none"), 8)
    channels, width = [3, 16, 32], 64
    kernels = sum(9 * a * b + b for a, b in itertools.pairwise(channels))
    parameters = kernels + (8 * 8 * 32 + 1) * width + (width + 1) * 10
    assert exchanged(step.as_text()) == Exchanged(1, 4 * (parameters + 2))


def test_another_collective_is_not_overlooked():
    with pytest.raises(ValueError, match="another kind: all-gather"):
        exchanged("x = f32[4] all-gather(y)")
