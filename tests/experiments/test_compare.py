"""The comparison from its command line: what it leaves behind, and how it fails."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from programs import PROGRESS, TINY

from bn_jax import xla
from bn_jax.errors import UserError
from bn_jax.lab import comparison, workdir
from bn_jax.lab.report import read_json as load
from bn_jax.lab.report import read_records
from bn_jax.lab.statistics import Record, summarize

LEFT = ["config.json", "figures", "records.jsonl", "report.html", "summary.json"]


def entries(folder):
    return sorted(os.listdir(folder))


def without_seconds(folder):
    return [{**r, "seconds": None} for r in read_records(folder / "records.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment, server):
    """The process, as it ended, and the workdir of one comparison."""
    folder = tmp_path_factory.mktemp("compare")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compare", *TINY, "--workdir=first run"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, folder / "first run"


def test_it_ends_well_and_prints_the_table_and_the_path_of_the_page(finished):
    done, folder = finished
    assert (done.returncode, entries(folder)) == (0, LEFT)
    lines = done.stderr.splitlines()
    assert all(map(PROGRESS.fullmatch, lines)), lines
    assert {*lines} >= {"none: 4 runs", "bn: 4 runs"}
    assert "digits, mlp. Target: test accuracy" in done.stdout
    assert [len(re.findall(rf"^{a} ", done.stdout, re.M)) for a in ("none", "bn")] == [1, 1]
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[-1] == "first run/report.html"


def test_the_config_and_the_page(finished):
    _, folder = finished
    config, page = load(folder / "config.json"), (folder / "report.html").read_text()
    first, *_, last = config["flags"]
    assert (first, last) == ("dataset", "resume")  # what all experiments share comes last
    assert config["devices"] == ["cpu: cpu"]
    assert {*config} >= {"xla_flags", "memory_kept", "seconds"}
    assert config["compiler_options"] == xla.compiler_options()
    assert config["seconds"]["total"] > config["seconds"]["compilation"] > 0
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert "python -m experiments.compare --features=8" in page


def test_the_records_and_the_summary(finished):
    _, folder = finished
    records, summary = read_records(folder / "records.jsonl"), load(folder / "summary.json")
    runs = [(r["arm"], r["learning_rate"], r["seed"]) for r in records]
    assert runs == [(a, rate, s) for a in ("none", "bn") for rate in (0.1, 1.0) for s in (0, 1)]
    starts = {}
    for r in records:
        assert r["steps"] == [0, 10, 20]
        assert r["momentum"] == (0.9 if r["arm"] == "bn" else None)
        assert r["train_loss"][0] is None
        starts.setdefault((r["arm"], r["seed"]), set()).add(r["test_loss"][0])
    # A seed has the same initial weights at every learning rate.
    assert [len(v) for v in starts.values()] == [1] * 4
    again = summarize([*map(Record.from_json, records)], baseline="none").to_json()
    assert {k: summary[k] for k in again} == json.loads(json.dumps(again))


def test_the_command_again_gives_the_same_records_and_overwriting_removes_the_old(
    finished, tmp_path, server
):
    _, folder = finished
    command = shlex.split(load(folder / "config.json")["command"])
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.png").touch()
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("summary.json", "records.jsonl", "report.html"):
        (tmp_path / name).write_text("old")
    done = server.run(*command[3:], f"--workdir={tmp_path}", "--overwrite")
    assert done.code == 0, done
    assert entries(tmp_path) == sorted([*LEFT, "notes.txt"])
    assert entries(tmp_path / "figures") == entries(folder / "figures")
    assert without_seconds(tmp_path) == without_seconds(folder)


@pytest.mark.long
def test_it_runs_in_a_notebook_on_four_arms_and_two_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    config = comparison.Config(
        dataset="circles", features=(8,), steps=20, eval_every=10, seeds=2, target=0.55,
        arms=("none", "bn", "layer", "group"), learning_rates=(0.1, 1.0), batch_size=20,
        activation="relu", workdir=str(tmp_path / "there"),
    )  # fmt: skip
    summary = comparison.run(config)
    assert [a["arm"] for a in summary["arms"]] == list(config.arms)
    assert [s["arm"] for s in summary["speedup"]] == ["bn", "layer", "group"]
    assert summary["target"] == {"metric": "test_accuracy", "value": 0.55, "chosen": "given"}
    assert summary == load(tmp_path / "there" / "summary.json")
    records = read_records(tmp_path / "there" / "records.jsonl")
    assert len(records) == 16
    assert max(r["test_accuracy"][-1] for r in records) > 0.5
    # A sigmoid that knows nothing has a loss of log 2 and some: ten classes would have 2.3.
    assert all(0.5 < r["test_loss"][0] < 1.5 for r in records)
    assert entries(tmp_path / "there") == LEFT
    assert "circles, mlp. Target: test accuracy 55 %" in capsys.readouterr().out


REFUSED = [
    ({"eval_every": 7}, "--eval_every=7 does not divide --steps=20"),
    ({"learning_rates": ()}, "--learning_rates=: name one or more"),
    ({"learning_rates": (1.0, 1.0)}, "each once"),
    ({"arms": ("bn", "bn")}, "each once"),
    ({"places": ()}, "name one or more"),
    ({"target": 95.0}, "--target=95.0: it must be above 0 and at most 1"),
    ({"validation_fraction": 1.0}, r"\[0, 1\)"),
    ({"batch_size": 1079}, "more than the 1078 training examples of digits"),
    ({"dataset": "circles", "augment": ("flip",)}, "augmentation is for images"),
    ({"model": "lstm", "places": ("recurrent",), "arms": ("group",)}, "--model=lstm"),
    ({"features": (0,)}, "--features=0"),
    ({"dataset": "circles", "model": "cnn", "features": (4, 8)}, "--features=4,8"),
    ({"model": "cnn", "features": (4, 4, 4, 4, 4, 8)}, "--features=4,"),  # pooled away
    ({"arms": ("nothing",)}, "--arms: unknown 'nothing', choose from none, bn, layer, group"),
    ({"model": "nothing"}, "--model: unknown 'nothing', choose from mlp, cnn"),
    ({"places": ("nothing",)}, "unknown 'nothing', choose from input, before, after"),
    ({"activation": "nothing"}, "unknown 'nothing', choose from relu, sigmoid"),
    ({"optimizer": "nothing"}, "--optimizer=nothing: choose from sgd, sgd_momentum"),
    ({"scaling": "nothing"}, "unknown.*'nothing'.*standard, unit, raw"),
    ({"dataset": "nothing", "data_dir": "/"}, "unknown dataset 'nothing': circles, digits, or"),
    (
        {"dataset": "mnist", "data_dir": "/", "cache_dir": "/none"},
        "'mnist' is not prepared",
    ),
    ({"parallel": "gird"}, "--parallel: unknown 'gird', choose from auto"),
    ({"parallel": "pmap", "bn_group_size": 12, "batch_size": 64}, "8 devices have 8 examples"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_before_there_is_a_workdir(tmp_path, flags, message):
    tiny = {"features": (8,), "steps": 20, "eval_every": 10, "seeds": 2}
    with pytest.raises(UserError, match=message):
        comparison.run(comparison.Config(**tiny | flags, workdir=str(tmp_path / "w")))
    assert not (tmp_path / "w").exists()


@pytest.mark.long
def test_the_group_and_not_the_number_of_devices_decides(tmp_path):
    """`--bn_group_size`; tests/lab/sweeps/test_parallel.py has the numbers of devices."""

    def losses(folder, **flags):
        tiny = {
            "features": (8,), "seeds": 1, "learning_rates": (0.3,), "steps": 2, "eval_every": 2,
            "batch_size": 64, "arms": ("bn",), "train_examples": 128,
        }  # fmt: skip
        comparison.run(comparison.Config(**tiny, workdir=str(tmp_path / folder), **flags))
        records = read_records(tmp_path / folder / "records.jsonl")
        return [loss for r in records for loss in (r["train_loss"][-1], r["test_loss"][-1])]

    alone = losses("a", parallel="single", bn_group_size=16)
    # Eight devices of eight examples: a group is of two of them.
    assert losses("b", parallel="pmap", bn_group_size=16) == pytest.approx(alone)
    assert abs(losses("c", parallel="single")[0] - alone[0]) > 1e-4
    device = losses("d", parallel="shard_map", bn_group_size=0)
    assert device == pytest.approx(losses("e", parallel="jit", bn_group_size=8))


@pytest.mark.parametrize("left", workdir.OUTPUTS)
def test_a_workdir_that_holds_another_run(tmp_path, left):
    (tmp_path / left).touch()
    with pytest.raises(UserError, match=f"workdir {tmp_path} holds another run.*--overwrite"):
        workdir.created(str(tmp_path), "compare", overwrite=False).__enter__()
    assert entries(tmp_path) == [left]


def test_a_wrong_flag_does_not_overwrite(server, tmp_path):
    (tmp_path / "records.jsonl").write_text('{"old": 1}\n')
    for flag in ("--arms=nothing", "--features=0"):
        server.run(*TINY, f"--workdir={tmp_path}", "--overwrite", flag).error()
        assert read_records(tmp_path / "records.jsonl") == [{"old": 1}]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "is a file: name a folder"),
        ("link", "is a symbolic link to nothing: name a folder"),
        ("link/x", "cannot be made: .*link: File exists"),
        ("file/x", "cannot be made: .*file/x: Not a directory"),
        ("/proc/runs", "/proc/runs"),
    ],
)
def test_a_workdir_that_cannot_be(tmp_path, kind, message):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=message):
        workdir.created(str(tmp_path / kind), "compare", False).__enter__()


def test_workdirs_that_nobody_named_or_that_hold_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(time, "strftime", lambda _: "20300101-000000")
    with (
        workdir.created(None, "compare", overwrite=False) as first,
        workdir.created(None, "compare", overwrite=False) as second,
    ):
        assert first != second
    with workdir.created("~/runs", "compare", overwrite=False) as folder:
        assert folder == tmp_path / "home" / "runs"
    (tmp_path / "notes.txt").touch()
    with workdir.created(str(tmp_path), "compare", overwrite=False) as folder:
        assert folder == tmp_path


def test_the_path_of_the_page_is_printed_as_it_is(finished, server, tmp_path):
    folder = tmp_path / "é [lr] :x:"
    done = server.run(*TINY, "--arms=none", "--seeds=1", f"--workdir={folder}")
    assert (done.code, done.out.splitlines()[-1]) == (0, f"{folder / 'report.html'}")


FULL = """
import errno
from bn_jax.lab import report
append, count = report.append_record, iter(range(99))

def full(file, record):
    if next(count) == 3:
        file.write(b'{"half of a')
        raise OSError(errno.ENOSPC, "No space left on device")
    append(file, record)

report.append_record = full
"""


def test_a_disk_that_fills_up_keeps_the_records_before(finished, server, tmp_path):
    done = server.run(*TINY, f"--workdir={tmp_path}", before=FULL)
    assert "No space left on device" in done.error()
    assert entries(tmp_path) == ["config.json", "records.jsonl"]
    assert without_seconds(tmp_path) == without_seconds(finished[1])[:3]


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(size)`: a folder on a file system of this size."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this user may not mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("size", "left"), [("8k", 2), ("16k", 2), ("104k", 4)])
def test_a_disk_that_is_full(finished, server, small_disk, size, left):
    """Full at the first record, at a later one, and at a figure."""
    folder = small_disk(size) / "run"
    done = server.run(*TINY, f"--workdir={folder}")
    message = done.error()
    assert "No space left on device" in message
    assert str(folder) in message or size != "8k"
    assert load(folder / "config.json")["flags"]["seeds"] == 2
    records = without_seconds(folder)
    assert records == without_seconds(finished[1])[: len(records)]
    assert not (folder / "report.html").exists()
    assert len(entries(folder)) == left, entries(folder)
    if left == 4:  # The numbers are whole; it is a figure that is missing.
        assert len(load(folder / "summary.json")["arms"]) == 2


MANY = (*TINY, "--seeds=20", "--arms=none", "--steps=400", "--eval_every=10")


def kill(server, folder, number, enough=3):
    """Starts many runs, sends a signal when some have ended; how it ended."""
    process = server.start(*MANY, f"--workdir={folder}")
    records, until = folder / "records.jsonl", time.monotonic() + 100
    while not records.exists() or records.read_bytes().count(b"\n") < enough:
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(process, number)
    return server.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_was_finished_outlives_a_signal(finished, server, tmp_path, number):
    done = kill(server, tmp_path, number)
    if number == signal.SIGINT:
        assert "interrupted; records of finished runs are kept" in done.error(code=130)
    else:
        assert done.code == -signal.SIGKILL
    records = read_records(tmp_path / "records.jsonl")
    assert 3 <= len(records) < 40
    assert [r["seed"] for r in records] == list(range(20))[: len(records)]
    assert {*entries(tmp_path)} - {workdir.LOCK} == {"config.json", "records.jsonl"}


INTERRUPTED_IN_A_CALLBACK = """
import gc, os, signal

def interrupt(*_):
    if len(records) == 2:
        records.append(None)
        os.kill(os.getpid(), signal.SIGINT)

from bn_jax.lab import report
append, records = report.append_record, []

def and_collect(file, record):
    append(file, record)
    records.append(record)
    gc.collect()

report.append_record = and_collect
gc.callbacks.append(interrupt)
"""


def test_an_interruption_while_garbage_is_collected_is_heeded(finished, server, tmp_path):
    """JAX has a callback there, in which interruptions of a compilation end up."""
    folder = tmp_path / "run"
    done = server.run(
        *TINY, "--arms=none", f"--workdir={folder}", before=INTERRUPTED_IN_A_CALLBACK
    )
    assert done.code == 130
    assert not (folder / "summary.json").exists()
