"""One process at a time in a folder."""

import dataclasses
import errno
import fcntl
import json
import os
import socket
import threading
import time

import pytest

from bn_jax.errors import UserError
from bn_jax.lab import comparison, lock, workdir
from experiments import correctness, make_report, recalibration

HERE = socket.gethostname()


def test_the_lock_is_held_by_one(tmp_path):
    path = tmp_path / "lock"
    with lock.held(path, "workdir w"):
        assert json.loads(path.read_text()) == {"pid": os.getpid(), "host": HERE}
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {HERE}: wait"):
            lock.held(path, "workdir w").__enter__()
    assert not path.exists()
    with lock.held(path, "workdir w"):
        pass


def test_one_at_a_time(tmp_path):
    """However the removal of the file falls between the others' attempts."""
    path, inside, most, entered = tmp_path / "lock", [], [], []

    def enter():
        for _ in range(50):
            try:
                with lock.held(path, "it"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(1e-4)
                    inside.pop()
                    entered.append(1)
            except UserError:
                time.sleep(1e-5)

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(entered) > 10


KILLED = """
import os, sys
from pathlib import Path
from bn_jax.lab import lock
held = lock.held(Path(sys.argv[1]), "it")
held.__enter__()
os._exit(9)
"""


def test_the_lock_of_a_process_that_was_killed_is_taken_over(server, tmp_path):
    path = tmp_path / "lock"
    assert server.run(str(path), code=KILLED).code == 9
    assert json.loads(path.read_text())["pid"] != os.getpid()
    with lock.held(path, "it"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("pid", "host", "free"),
    [
        (None, None, True),
        (2**22 + 1, HERE, True),  # above the largest number of a process
        (os.getppid(), HERE, False),
        (2**22 + 1, "elsewhere", False),
    ],
)
def test_without_locks_the_file_decides(tmp_path, monkeypatch, pid, host, free):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "lock"
    monkeypatch.setattr(fcntl, "flock", flock)
    path.write_text(json.dumps({"pid": pid, "host": host}) if pid else "")
    if free:
        with lock.held(path, "it"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        return
    with pytest.raises(UserError, match=f"process {pid} on {host}.*delete {path}"):
        lock.held(path, "it").__enter__()


@pytest.mark.parametrize(
    "experiment", [comparison, correctness, recalibration], ids=lambda m: m.EXPERIMENT
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_start_is_refused(tmp_path, experiment, overwrite):
    """A file of the first stays as it is, with --overwrite too."""
    config = experiment.Config(workdir=str(tmp_path), overwrite=overwrite)
    if experiment is recalibration:
        config = dataclasses.replace(config, dataset="digits", model="mlp", images=(20,))
    with workdir.created(str(tmp_path), experiment.EXPERIMENT, False):
        (tmp_path / "records.jsonl").write_text("of the first")
        with pytest.raises(UserError, match=f"workdir {tmp_path} is in use by process"):
            experiment.run(config)
    assert (tmp_path / "records.jsonl").read_text() == "of the first"


def test_a_page_is_made_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(make_report, "newest", lambda runs: [])
    out = tmp_path / "page.md"
    with (
        lock.held(tmp_path / ".page.md.lock", "it"),
        pytest.raises(UserError, match=f"--out={out} is in use by process"),
    ):
        make_report.run(make_report.Config(out=str(out)))
