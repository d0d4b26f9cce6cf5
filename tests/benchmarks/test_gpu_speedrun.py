"""The speedrun within the GPU's benchmark: what fits into the time, and what is left of it."""

import dataclasses
import json
import time

import pytest

from benchmarks import gpu_speedrun
from benchmarks.gpu_speedrun import OTHERS, RECIPE, seeds_in, speedrun, train
from benchmarks.gpu_timer import SKIPPED
from experiments import cifar_speedrun

# Leaves runs of the first of its arms at two learning rates, as the experiment would.
PROGRAM = """
import json, pathlib, sys, time
given = dict(a.removeprefix("--").split("=") for a in sys.argv[1:])
folder = pathlib.Path(given["workdir"])
folder.mkdir(parents=True)
(folder / "given.json").write_text(json.dumps(given))
with open(folder / "records.jsonl", "w") as file:
    for rate in (1.0, 2.0):
        for seed in range(int(given["seeds"])):
            right = [0.1, 0.93 + 0.01 * rate + 0.002 * seed]
            record = {
                "arm": given["arms"].split(",")[0], "learning_rate": rate, "init_scale": 1.0,
                "momentum": None, "seed": seed, "steps": [0, 476],
                "validation_accuracy": right, "test_accuracy": right,
                "seconds": {"compilation": 1.0, "training": 3.0, "evaluation": 2.0},
            }
            file.write(json.dumps(record) + chr(10))
print("it ran")
"""


@pytest.fixture
def program(monkeypatch):
    """`program(end)` puts a program in the experiment's place that ends like this."""

    def install(end=""):
        monkeypatch.setattr(gpu_speedrun, "COMMAND", ("-c", PROGRAM + end))

    install()
    return install


def given(folder):
    return json.loads((folder / "given.json").read_text())


def test_the_recipe_and_then_the_others(program, tmp_path, capfd):
    rows = list(speedrun(["--cache_dir=there"], tmp_path, time.monotonic() + 600))
    assert [row["arm"] for row in rows] == [RECIPE, *OTHERS]
    (recipe, first, *rest) = rows
    assert recipe["seconds"] == 3 + 2 / 2
    assert recipe["epochs"] == 476 / 48
    assert recipe["accuracy"] == pytest.approx(0.95 + 0.002 * 9.5)
    assert recipe["note"] == "20 of 20 reach 94 %"
    assert first["seconds"] == 4
    assert {row["seconds"] for row in rest} == {None}
    one, other = given(tmp_path / "bn"), given(tmp_path / "others")
    assert (one["arms"], one["seeds"], one["cache_dir"]) == ("bn", "20", "there")
    assert other["arms"] == ",".join(cifar_speedrun.ARMS[1:])
    assert 1 <= int(other["seeds"]) <= 20
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines().count("it ran") == 2


def test_what_is_finished_when_the_time_is_spent_counts(program, tmp_path):
    program("time.sleep(60)")
    start = time.monotonic()
    records, note = train(["bn"], 2, [], tmp_path / "a", start + 5)
    assert time.monotonic() - start < 30
    assert (len(records), note) == (4, "out of time")
    row = gpu_speedrun.row("bn", records, note)
    assert row["note"] == "2 of 2 reach 94 %; out of time"
    assert gpu_speedrun.row("none", records, note)["note"] == "out of time"


def test_an_experiment_that_fails_says_so(program, tmp_path):
    program("sys.exit(3)")
    records, note = train(["bn"], 1, [], tmp_path / "a", time.monotonic() + 60)
    assert (len(records), note) == (2, "ended with status 3")


def test_nothing_starts_too_late(program, tmp_path):
    (row,) = speedrun([], tmp_path, time.monotonic() - 1)
    assert (row["arm"], row["seconds"], row["note"]) == ("bn", None, SKIPPED)
    assert not list(tmp_path.iterdir())


def test_as_many_seeds_as_fit():
    """10 points of 7 arms, which compile in 5 s each; a run takes 2 s."""
    record = {"seconds": {"compilation": 5.0, "training": 1.5, "evaluation": 0.5}}
    for seconds, seeds in ((35 + 20, 1), (35 + 39, 1), (35 + 61, 3), (10_000, 20), (-5, 1)):
        assert seeds_in(seconds, [record]) == seeds


def test_the_experiment_knows_its_flags():
    names = {f.name for f in dataclasses.fields(cifar_speedrun.Config)}
    assert {"dtype", "arms", "seeds", "workdir", "data_dir", "cache_dir"} <= names
    assert gpu_speedrun.COMMAND[1] == cifar_speedrun.__name__


@pytest.mark.long
def test_the_experiment_itself(tmp_path):
    """A tiny one: its records are what rows are made of."""
    tiny = [
        "--quick", "--features=8", "--steps=42", "--eval_every=21", "--views=1",
        "--parallel=single",
    ]  # fmt: skip
    records, note = train(["bn"], 1, tiny, tmp_path / "bn", time.monotonic() + 300)
    row = gpu_speedrun.row("bn", records, note)
    assert (note, len(records)) == ("", 1)
    assert row["seconds"] == pytest.approx(cifar_speedrun.run_seconds(records[0]))
    assert 0 < row["accuracy"] <= 1
