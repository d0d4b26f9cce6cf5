"""Runs that end anywhere between two writes: the same command ends in the same folder.

A kill leaves the files as they are at that moment, so a copy of the folder at every write is
what kills there leave. What a sweep finds is made up: `test_survival.py` kills real ones.
"""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from results import make_record

from bn_jax.errors import UserError
from bn_jax.lab import comparison, experiment, report, sweeps, workdir
from bn_jax.lab.statistics import Point, Record
from experiments import correctness, defects, make_report, recalibration

SECONDS = {"total": 1.0, "compilation": 0.5, "training": 0.2, "evaluation": 0.1}
COMPARE = comparison.Config(
    features=(8,), steps=20, eval_every=10, seeds=1, learning_rates=(0.1, 1.0), arms=("bn",)
)
RECALIBRATION = recalibration.Config(
    dataset="digits", model="mlp", features=(8,), steps=4, seeds=2, images=(20, 60)
)


def record(arm, point, seed):
    losses, accuracies = [2.0, 1.0 / point.learning_rate, 0.5], [0.1, 0.5, 0.9]
    series = {f"{split}_loss": losses for split in ("validation", "test")}
    series |= {"train_loss": [None, *losses[1:]], "train_accuracy": [None, 0.5, 0.9]}
    return make_record(arm, seed=seed, accuracy=accuracies, **point._asdict(), **series)


@pytest.fixture
def trained(monkeypatch):
    """What the made up sweeps trained so far."""
    trained = []

    def sweep(run, dataset, points, seeds, budget, *, arm, done, **_):
        for point in points:
            for seed in seeds:
                if not done(point, seed):
                    trained.append((point.learning_rate, seed))
                    yield [record(arm, point, seed)]

    def networks(config, one, dataset, seed):
        trained.append(seed)
        return seed, seed + 0.5

    def recalibrated(config, one, dataset, variables):
        return [
            {"images": n, "statistics_error": 1 / (1 + n) + variables, "test_accuracy": 0.5}
            for n in (0, *config.images, 1078)
        ]

    few = defects.defects()[:1]
    monkeypatch.setattr(sweeps, "sweep", sweep)
    monkeypatch.setattr(experiment, "seconds", lambda records, total: SECONDS)
    monkeypatch.setattr(recalibration, "trained", networks)
    monkeypatch.setattr(recalibration, "recalibrated", recalibrated)
    monkeypatch.setattr(defects, "defects", lambda: few)
    return trained


def make_page(folder):
    """docs/results.md beside a finished run."""
    run = folder.parent / "finished"
    if not run.exists():
        comparison.run(dataclasses.replace(COMPARE, workdir=str(run)))
    make_report.run(make_report.Config(workdirs=(str(run),), out=str(folder / "page.md")))


def command(config, run):
    return lambda folder: run(dataclasses.replace(config, workdir=str(folder)))


COMMANDS = {
    "compare": (command(COMPARE, comparison.run), 2),
    "recalibration": (command(RECALIBRATION, recalibration.run), 2),
    "correctness": (command(correctness.Config(), correctness.run), 0),
    "make_report": (make_page, 0),
}


def content(folder, started=None):
    """Every file but the workdir's name, of now and when it was started; no temporary ones."""

    def unnamed(found):
        return found.replace(bytes(folder), b"w").replace(bytes(started or folder), b"w")

    return {
        str(path.relative_to(folder)): unnamed(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != workdir.LOCK and not path.name.startswith(".")
    }


def at_every_write(patch, folder, see):
    """Calls `see` at every write: what is written is there in part, or whole."""
    replace, append = os.replace, report.append_record

    def replaced(source, target):
        see(Path(source))
        replace(source, target)
        see()

    def appended(file, record):
        size = os.path.getsize(file.name)
        file.write(json.dumps(record).encode()[:9])
        see()
        os.truncate(file.name, size)
        append(file, record)
        see()

    patch.setattr(os, "replace", replaced)
    patch.setattr(report, "append_record", appended)


def killed_everywhere(patch, run, folder, copies):
    """Runs; copies of the folder at every write, a file that is being written halved too."""
    count = iter(range(999))

    def see(halved=None):
        copy = copies / f"{next(count):03}"
        shutil.copytree(folder, copy)
        if halved is not None:
            os.truncate(copy / halved.relative_to(folder), halved.stat().st_size // 2)

    with patch.context() as inside:
        at_every_write(inside, folder, see)
        run(folder)
    return sorted(copies.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_any_write_ends_in_the_same_folder(trained, name, tmp_path, monkeypatch):
    run, count = COMMANDS[name]
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    whole.mkdir()
    copies.mkdir()
    if name == "make_report":
        run(tmp_path / "first")
    killed = killed_everywhere(monkeypatch, run, whole, copies)
    expected = content(whole)
    assert len(killed) >= 2 * len(expected)
    for folder in killed:
        records = folder / "records.jsonl"
        there = report.read_records(records) if records.exists() else []
        trained.clear()
        run(folder)
        assert content(folder, whole) == expected, folder
        assert not any(folder.rglob(".*")), folder
        if name == "compare":
            assert len(trained) == count - len(there)
        if name == "recalibration":
            assert trained == [0, 1][len(there) // 8 :]


@pytest.mark.parametrize("name", ["compare", "recalibration", "correctness"])
def test_a_disk_that_is_full_at_any_write_loses_nothing(trained, name, tmp_path, monkeypatch):
    """And on the disk that was full the same command ends, once there is room."""
    run, _ = COMMANDS[name]

    def kept(folder):
        path = folder / "records.jsonl"
        found = report.read_records(path) if path.exists() else []
        # A network of which some are missing is trained again.
        return found[: len(found) // 8 * 8] if name == "recalibration" else found

    run(tmp_path / "whole")
    expected, number = content(tmp_path / "whole"), 0
    folder = tmp_path / "w"
    while True:
        left, before = iter(range(number)), (content(folder).keys(), kept(folder))

        def see(_=None, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as inside:
            at_every_write(inside, folder, see)
            try:
                run(folder)
                break
            except OSError as e:
                full = e.errno
        assert full == errno.ENOSPC
        after = content(folder).keys(), kept(folder)
        assert before[0] <= after[0]
        assert before[1] == after[1][: len(before[1])]
        number += 3
    assert number > len(expected)
    assert content(folder) == expected


def test_a_finished_run_of_before_counts_as_finished(trained, tmp_path, capsys):
    """Nothing is written, and nothing is trained."""
    run, _ = COMMANDS["compare"]
    run(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    trained.clear()
    run(tmp_path)
    assert "has this run, finished" in capsys.readouterr().out
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert not trained


@pytest.mark.parametrize(
    "lost", ["report.html", "summary.json", "figures/captions.json", "figures/accuracy.png"]
)
def test_what_is_missing_is_made_from_the_records(trained, lost, tmp_path):
    run, _ = COMMANDS["compare"]
    run(tmp_path)
    expected = content(tmp_path)
    trained.clear()
    (tmp_path / lost).unlink()
    if lost == "figures/captions.json":  # as of a version that had none
        run(tmp_path)
        expected.pop(lost)
    else:
        run(tmp_path)
    assert content(tmp_path) == expected
    assert not trained


DAMAGE = {"empty": b"", "cut": b'{"experiment": "comp', "no text": b"\xff\xfe", "a list": b"[]"}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "summary.json", "figures/captions.json"])
def test_a_damaged_file_is_named(trained, name, damage, tmp_path):
    run, _ = COMMANDS["compare"]
    run(tmp_path)
    (tmp_path / name).write_bytes(damage)
    page = make_report.Config(workdirs=(str(tmp_path),), out=str(tmp_path / "page.md"))
    for call in (lambda: run(tmp_path), lambda: make_report.run(page)):
        with pytest.raises(UserError, match=f"{tmp_path / name} is cut or damaged") as raised:
            call()
        assert "\n" not in str(raised.value)


def test_damaged_records_are_named(trained, tmp_path):
    """But a last line that was cut is made again."""
    run, _ = COMMANDS["compare"]
    run(tmp_path)
    (tmp_path / "report.html").unlink()
    path = tmp_path / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    trained.clear()
    path.write_bytes(lines[0] + lines[1][:20])
    run(tmp_path)
    assert trained == [(1.0, 0)]
    (tmp_path / "report.html").unlink()
    for damaged in (b"nothing\n" + lines[1], b'{"arm": "bn"}\n'):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"records\.jsonl"):
            run(tmp_path)


def test_a_page_is_not_made_of_an_unfinished_run(trained, tmp_path):
    run, _ = COMMANDS["compare"]
    run(tmp_path / "compare/a")
    (tmp_path / "compare/a/figures/accuracy.png").unlink()
    for given in ({"workdirs": (str(tmp_path / "compare/a"),)}, {"runs": str(tmp_path)}):
        with pytest.raises(UserError, match="finished run"):
            make_report.run(make_report.Config(**given, out=str(tmp_path / "page.md")))


def test_points_are_found_in_records():
    """A record from a file is the one that was written."""
    written = record("bn", Point(0.1, 1.0, 0.9), 3)
    assert Record.from_json(json.loads(json.dumps(written.to_json()))) == written
