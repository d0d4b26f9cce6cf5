"""Runs that are killed, and go on: the same records and weights to the bit."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
from killing import FLAGS, PROGRAM, assert_same, kill, records
from programs import PROGRESS

from bn_jax.lab.resumable import Resumable
from bn_jax.lab.training.checkpoint import Checkpoints, Restored


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A run that nobody disturbs, and how long it takes once it is compiled."""
    for folder in (tmp_path_factory.mktemp(name) for name in ("compiled", "whole")):
        start = time.monotonic()
        assert server.run(*FLAGS, f"--workdir={folder}", code=PROGRAM).code == 0
    return folder, time.monotonic() - start


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(whole, server, tmp_path, kills):
    """Some of them inside a save. tests/stress/kill.py kills more often."""
    expected, seconds = whole
    print(kill(server, tmp_path, kills, expected, seconds))


# As a scheduler would, while the second run is trained: from outside it might come too late.
SIGTERM = """
import os, signal
from bn_jax.lab.resumable import Resumable

def after(self, arm, evaluation, records, after=Resumable.after):
    if len(records) == 1 and evaluation.step:
        os.kill(os.getpid(), signal.SIGTERM)
    after(self, arm, evaluation, records)

Resumable.after = after
"""


def test_sigterm_saves(whole, server, tmp_path):
    folder, flags = tmp_path / "w", [f for f in FLAGS if "checkpoint_every" not in f]
    done = server.run(*flags, f"--workdir={folder}", before=SIGTERM, code=PROGRAM)
    assert done.code == 75
    assert "stopped by SIGTERM; the same command with this workdir goes on" in done.err
    assert len(records(folder)) == 1
    done = server.run(*flags, f"--workdir={folder}", code=PROGRAM)
    assert done.code == 0
    assert_same(folder, whole[0])


def test_a_finished_run_is_left_as_it_is(whole, server):
    folder, _ = whole
    before = (folder / "records.jsonl").stat().st_mtime_ns
    done = server.run(*FLAGS, f"--workdir={folder}", code=PROGRAM)
    assert done.code == 0
    assert f"{folder} has this run, finished; --overwrite repeats it" in done.out
    assert (folder / "records.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_size=30",), "holds another run, whose --batch_size is 60 and not 30"),
        (("--arms=bn,none",), "holds another run, whose --arms is bn and not bn,none"),
        (("--noresume",), "holds another run: choose another, or --overwrite deletes it"),
    ],
)
def test_a_run_with_other_flags_is_refused(whole, server, flags, message):
    folder, _ = whole
    rest = [f for f in FLAGS if f.partition("=")[0] != flags[0].partition("=")[0]]
    assert message in server.run(*rest, *flags, f"--workdir={folder}", code=PROGRAM).error()


def test_a_damaged_checkpoint_is_said(whole, server, tmp_path):
    """The one before is gone on with; with none whole the run says so."""
    folder = tmp_path / "w"
    pid = server.start(*FLAGS, f"--workdir={folder}", code=PROGRAM)
    while len([p for p in folder.glob("checkpoints/*") if p.name.isdecimal()]) < 2:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    server.wait()
    steps = sorted(int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdecimal())
    newest = folder / "checkpoints" / str(steps[-1])
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    done = server.run(*FLAGS, f"--workdir={folder}", code=PROGRAM)
    assert done.code == 0
    said = [line for line in done.err.splitlines() if not PROGRESS.fullmatch(line)]
    assert any(f"checkpoint of step {steps[-1]} is damaged" in line for line in said)
    assert_same(folder, whole[0])


KILLED_BEFORE_THE_PAGE = """
import os, signal
from pathlib import Path

def write_text(self, text, write=Path.write_text):
    if self.name == "report.html":
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, text)

Path.write_text = write_text
"""
NOTHING_IS_TRAINED = """
from bn_jax.lab.resumable import Resumable

def after(self, *_):
    raise AssertionError("trained again")

Resumable.after = after
"""


def test_what_a_watcher_kept_outlives_the_training(whole, server, tmp_path):
    """Of a run too short for a checkpoint by the clock."""
    flags = [f for f in FLAGS if "checkpoint_every" not in f] + [f"--workdir={tmp_path}"]
    done = server.run(*flags, before=KILLED_BEFORE_THE_PAGE, code=PROGRAM)
    assert done.code == -signal.SIGKILL
    (tmp_path / "weights.npz").unlink()
    done = server.run(*flags, before=NOTHING_IS_TRAINED, code=PROGRAM)
    assert done.code == 0, done
    assert_same(tmp_path, whole[0])


def test_records_of_no_checkpoint_are_made_again(whole, server, tmp_path):
    """As after a kill within the first minute."""
    folder, flags = tmp_path / "w", [f for f in FLAGS if "checkpoint_every" not in f]
    pid = server.start(*flags, f"--workdir={folder}", code=PROGRAM)
    while not (folder / "records.jsonl").exists() or not records(folder):
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    server.wait()
    with open(folder / "records.jsonl", "a") as file:
        file.write(json.dumps({"cut": 1})[:5])
    assert server.run(*flags, f"--workdir={folder}", code=PROGRAM).code == 0
    assert_same(folder, whole[0])


# Small networks of inception: an arm, and an ensemble of two and of one network.
INCEPTION = """
from bn_jax.lab import flags
from experiments import inception
flags.main(inception.Config, inception.run)
"""
ENSEMBLE = (
    "--quick", "--arms=inception", "--blocks=3c", "--width=0.03125", "--batch_size=8",
    "--steps=6", "--eval_every=2", "--seeds=1", "--train_examples=16", "--test_examples=50",
    "--ensemble=3", "--max_runs_at_once=1",
)  # fmt: skip
# While the second of the three is trained.
KILL = """
import os, signal
from bn_jax.lab import watchers

def see(self, arm, evaluation, call=watchers.Weights.__call__):
    if arm == "ensemble, dropout 0.05" and evaluation.number and evaluation.step >= 4:
        os.kill(os.getpid(), signal.{})
    call(self, arm, evaluation)

watchers.Weights.__call__ = see
"""


@pytest.fixture(scope="module")
def ensemble(server, tmp_path_factory):
    """An inception that nobody disturbs."""
    folder = tmp_path_factory.mktemp("ensemble")
    assert server.run(*ENSEMBLE, f"--workdir={folder}", code=INCEPTION).code == 0
    return folder


def concluded(folder):
    """The summary without what is measured in seconds."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(json.loads((folder / "summary.json").read_text()))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGKILL", -signal.SIGKILL)])
def test_an_ensemble_goes_on(ensemble, server, tmp_path, name, code):
    """What was trained before it, and of it, is not trained again."""
    every = {"SIGTERM": 60, "SIGKILL": 0}[name]  # SIGTERM saves without being due
    flags = (*ENSEMBLE, f"--workdir={tmp_path}", f"--checkpoint_every={every}")
    assert server.run(*flags, before=KILL.format(name), code=INCEPTION).code == code
    assert [r["arm"] for r in records(tmp_path)] == ["inception", "ensemble, dropout 0.05"]
    done = server.run(*flags, code=INCEPTION)
    assert done.code == 0
    assert "inception: " not in done.err
    assert concluded(tmp_path) == concluded(ensemble)
    assert records(tmp_path) == records(ensemble)


def test_arms_that_follow_others(monkeypatch, tmp_path):
    """Where a run goes on that was stopped within its second arms."""
    about = {"arm": "c", "number": 2, "records": [], "steps": 130}
    found = Restored(130, None, about)
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(Checkpoints, "restore", lambda self: found)
    resumable = Resumable(tmp_path, 60, {})

    def plans(steps):
        return {"x": SimpleNamespace(budget=SimpleNamespace(steps=steps), count=1)}

    assert (resumable.done(plans(100)), list(resumable.rest({"a": 1, "b": 2}))) == (100, [])
    assert resumable.done(plans(60)) == 30
    began = {
        arm: resumable.where(arm).get("first") for arm, _ in resumable.rest({"c": 3, "d": 4})
    }
    assert began == {"c": 2, "d": None}
    assert (resumable.done(plans(20)), list(resumable.rest({"e": 5}))) == (0, [("e", 5)])
