"""What is lost when one of several contestants fails: its own row."""

import time

import jax

from benchmarks import gpu_timer
from benchmarks.gpu_timer import Timer
from bn_jax.measure.timing import WARMUP

RESOURCES = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."


def fails_after(calls, error):
    """A call that fails then."""
    left = iter(range(calls))

    def call():
        if next(left, None) is None:
            raise error

    return call


def make_failing():
    raise jax.errors.JaxRuntimeError(RESOURCES)


def test_one_row_fails_and_the_others_are_timed(capsys):
    makers = {
        "compiling": make_failing,
        "running": lambda: fails_after(1, RuntimeError("CUDA out of memory. Tried to")),
        "another": lambda: fails_after(0, ValueError("no such | thing\nnor that")),
        "good": lambda: lambda: time.sleep(0.01),
    }
    found = Timer(time.monotonic() + 60, rounds=1)(makers, 2)
    assert {name: row["note"] for name, row in found.items()} == {
        "compiling": "out of memory",
        "running": "out of memory",
        "another": "ValueError: no such | thing",
        "good": "",
    }
    assert [row["seconds"] is None for row in found.values()] == [True, True, True, False]
    assert found["good"]["seconds"] >= 0.01
    errors = capsys.readouterr().err
    assert "ValueError" in errors
    assert "out of memory" not in errors


def test_seconds_are_of_one_call(monkeypatch):
    count, asked = [], []

    def interleave(ready, rounds):
        asked.append(rounds)
        return {name: [9.0, 1.0, 2.0] for name in ready}

    monkeypatch.setattr(gpu_timer, "interleave", interleave)
    found = Timer(time.monotonic() + 60, rounds=3)({"a": lambda: lambda: count.append(0)}, 4)
    assert found["a"] == {"seconds": 0.5, "note": ""}
    assert (asked, len(count)) == ([3], 4)


def test_rounds_and_calls():
    count = []
    Timer(time.monotonic() + 60, rounds=3)({"a": lambda: lambda: count.append(0)}, 2)
    assert len(count) == 2 * (1 + WARMUP + 3)


def test_the_budget_may_be_spent_between_two():
    timer = Timer(time.monotonic() + 0.2, rounds=1)
    makers = {"slow": lambda: lambda: time.sleep(0.25), "late": lambda: lambda: None}
    found = timer(makers, 1)
    assert [row["note"] for row in found.values()] == ["", gpu_timer.SKIPPED]
    assert found["slow"]["seconds"] >= 0.25
    assert found["late"]["seconds"] is None
