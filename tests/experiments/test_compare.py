"""The comparison from its command line: what it leaves behind, and how it fails."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags as absl_flags
from programs import PROGRESS, TINY

from bn_jax.report import read_records
from bn_jax.training import xla
from experiments import compare, flags, workdir

ARMS, RATES, SEEDS = ("none", "bn"), (0.1, 1.0), (0, 1)
LEFT = ["config.json", "figures", "records.jsonl", "report.html", "summary.json"]


def load(path):
    return json.loads(Path(path).read_text())


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


def test_it_ends_well_and_leaves_five_things(finished):
    done, folder = finished
    assert (done.returncode, entries(folder)) == (0, LEFT)
    lines = done.stderr.splitlines()
    assert all(map(PROGRESS.fullmatch, lines)), lines
    assert set(lines) >= {"none: 4 runs", "bn: 4 runs"}


def test_the_config(finished):
    _, folder = finished
    config = load(folder / "config.json")
    assert config["experiment"] == "compare"
    given = {"features": [8], "steps": 20, "eval_every": 10, "seeds": 2, "max_runs_at_once": 1}
    given |= {"learning_rates": [0.1, 1.0], "workdir": "first run"}
    defaults = json.loads(json.dumps(dataclasses.asdict(compare.Config())))
    assert config["flags"] == defaults | given
    first, *_, last = config["flags"]
    assert (first, last) == ("dataset", "resume")  # what all experiments share comes last
    assert config["devices"] == ["cpu: cpu"]
    for package in ("python", "jax", "jaxlib", "flax", "optax", "numpy"):
        assert re.match(r"\d+\.\d+", config["versions"][package])
    assert set(config) >= {"machine", "git_commit", "xla_flags", "memory_kept", "seconds"}
    assert config["compiler_options"] == xla.compiler_options()
    assert config["seconds"]["total"] > config["seconds"]["compilation"] > 0


def test_the_records(finished):
    _, folder = finished
    records = read_records(folder / "records.jsonl")
    runs = [(r["arm"], r["learning_rate"], r["seed"]) for r in records]
    assert runs == [(a, rate, s) for a in ARMS for rate in RATES for s in SEEDS]
    for r in records:
        assert r["steps"] == [0, 10, 20]
        assert r["momentum"] == (0.9 if r["arm"] == "bn" else None)
        assert (r["init_scale"], r["diverged_at"]) == (1.0, None)
        assert r["train_loss"][0] is None
        for split in ("validation", "test"):
            assert all(0 <= v <= 1 for v in r[f"{split}_accuracy"])
            assert all(v > 0 for v in r[f"{split}_loss"])
        assert set(r["seconds"]) == {
            "per_step", "training", "evaluation", "compilation", "runs_at_once",
        }  # fmt: skip


def test_a_seed_starts_every_arm_from_the_same_accuracy(finished):
    """One seed has the same initial weights at every learning rate."""
    _, folder = finished
    starts = {}
    for r in read_records(folder / "records.jsonl"):
        starts.setdefault((r["arm"], r["seed"]), set()).add(r["test_loss"][0])
    assert [len(v) for v in starts.values()] == [1] * 4


def test_the_summary(finished):
    _, folder = finished
    summary = load(folder / "summary.json")
    assert summary["experiment"] == "compare"
    assert summary["dataset"] == "digits"
    target = summary["target"]
    assert (target["metric"], target["chosen"]) == ("test_accuracy", "best of the baseline")
    assert 0 < target["value"] <= 1
    assert [a["arm"] for a in summary["arms"]] == list(ARMS)
    for arm in summary["arms"]:
        assert set(arm) >= {
            "arm", "learning_rate", "seeds", "reached", "steps_to_target", "seconds_to_target",
            "max_accuracy", "trainable_learning_rates", "diverged",
        }  # fmt: skip
        assert (arm["seeds"], arm["diverged"]) == (2, 0)
        assert set(arm["steps_to_target"]) == {"median", "ci95"}
    (speedup,) = summary["speedup"]
    assert (speedup["arm"], speedup["over"]) == ("bn", "none")
    assert set(speedup["steps"]) >= {"ratio", "ci95"}
    assert set(speedup["seconds"]) >= {"ratio", "ci95"}


def test_the_summary_is_that_of_the_records(finished):
    from bn_jax.measure import summarize

    _, folder = finished
    summary = load(folder / "summary.json")
    again = summarize(read_records(folder / "records.jsonl"), baseline="none")
    assert {k: summary[k] for k in again} == again


def test_the_figures(finished):
    _, folder = finished
    names = [name for name in entries(folder / "figures") if name != "captions.json"]
    assert len(names) == 3
    for name in names:
        image = (folder / "figures" / name).read_bytes()
        assert image.startswith(b"\x89PNG\r\n")
        assert image.endswith(b"IEND\xaeB`\x82")


def test_the_page(finished):
    _, folder = finished
    page = (folder / "report.html").read_text()
    assert "Does BatchNorm make this mlp train faster?" in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert "python -m experiments.compare --features=8" in page
    assert page.rstrip().endswith("</html>")


def test_standard_output_is_the_table_and_the_path_of_the_page(finished):
    done, _ = finished
    assert "digits, mlp. Target: test accuracy" in done.stdout
    assert [len(re.findall(rf"^{arm} ", done.stdout, re.M)) for arm in ARMS] == [1, 1]
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[-1] == "first run/report.html"


def test_the_command_reproduces_the_flags(finished):
    _, folder = finished
    config = load(folder / "config.json")
    python, option, module, *arguments = shlex.split(config["command"])
    assert (python, option, module) == ("python", "-m", "experiments.compare")
    values = absl_flags.FlagValues()
    flags.define(compare.Config, values)
    values([module, *arguments])
    found = {name: values[name].value for name in config["flags"]}
    again = json.loads(json.dumps(found)) | {"workdir": config["flags"]["workdir"]}
    assert again == config["flags"]


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
    config = compare.Config(
        dataset="circles", features=(8,), steps=20, eval_every=10, seeds=2, target=0.55,
        arms=("none", "bn", "layer", "group"), learning_rates=(0.1, 1.0), batch_size=20,
        activation="relu", workdir=str(tmp_path / "there"),
    )  # fmt: skip
    summary = compare.run(config)
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


def test_importing_it_defines_no_flags():
    assert "learning_rates" not in absl_flags.FLAGS


CHOICES = {
    "arms": "none, bn, layer, group", "model": "mlp, cnn", "places": "input, before, after",
    "activation": "relu, sigmoid", "optimizer": "sgd, sgd_momentum, sgd_nesterov",
    "scaling": "standard, unit, raw",
}  # fmt: skip
NUMBERS = [
    ("--seeds=0", "at least 1"),
    ("--seeds=-2", "at least 1"),
    ("--steps=0", "at least 1"),
    ("--batch_size=0", "at least 1"),
    ("--eval_every=0", "at least 1"),
    ("--max_runs_at_once=0", "at least 1"),
    ("--eval_every=7", "does not divide --steps=20"),
    ("--learning_rates=0.1,-1", "-1.0 must be positive"),
    ("--learning_rates=0", "0.0 must be positive"),
    ("--learning_rates=nan", "nan must be positive"),
    ("--learning_rates=inf", "inf must be positive"),
    ("--learning_rates=", "name one or more"),
    ("--learning_rates=1,1.0", "each once"),
    ("--init_scales=-1", "-1.0 must be positive"),
    ("--momentums=1", "1.0 must be in [0, 1)"),
    ("--momentums=nan", "nan must be in [0, 1)"),
    ("--arms=", "name one or more"),
    ("--arms=bn,bn", "each once"),
    ("--places=,", "name one or more"),
    ("--target=1.1", "in (0, 1]"),
    ("--target=95", "in (0, 1]"),
    ("--target=0", "in (0, 1]"),
    ("--target=-0.5", "in (0, 1]"),
    ("--target=nan", "in (0, 1]"),
    ("--validation_fraction=1", "[0, 1)"),
    ("--batch_size=1079", "more than the 1078 training examples of digits"),
]
NOT_NUMBERS = ["--learning_rates=x", "--learning_rates=0.1,x", "--seeds=x", "--target=x"]


@pytest.fixture
def refused(server, tmp_path):
    """`refused(*flags)` is the one line of an error; there is no workdir then."""

    def call(*argv):
        folder = tmp_path / "workdir"
        message = server.run(*TINY, f"--workdir={folder}", *argv).error()
        assert not folder.exists()
        return message

    return call


@pytest.mark.parametrize(("argument", "advice"), NUMBERS)
def test_numbers_out_of_range(refused, argument, advice):
    message = refused(argument)
    name, value = argument.strip("-").split("=")
    assert name in message
    assert value.split(",")[-1] in message
    assert advice in message


@pytest.mark.parametrize("argument", NOT_NUMBERS)
def test_what_is_not_a_number(refused, argument):
    assert f"flag {argument}: " in refused(argument)


@pytest.mark.parametrize("name", CHOICES)
def test_names_that_are_unknown(refused, name):
    message = refused(f"--{name}=nothing")
    assert name in message
    assert "unknown" in message
    assert "'nothing'" in message
    assert CHOICES[name] in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *((["--dataset=circles", f"--augment={name}"], "augmentation is for images")
          for name in ("flip", "shift", "distort")),
        (["--model=lstm", "--places=recurrent", "--arms=group"], "--model=lstm"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_network(refused, argv, message):
    assert message in refused(*argv)


def test_an_unknown_dataset(refused, tmp_path):
    message = refused("--dataset=nothing", f"--data_dir={tmp_path}")
    assert "unknown dataset 'nothing': circles, digits, or" in message


def test_a_dataset_that_is_not_prepared(refused, tmp_path):
    message = refused("--dataset=mnist", f"--data_dir={tmp_path}", f"--cache_dir={tmp_path}")
    assert f"'mnist' is not prepared in {tmp_path}" in message
    assert "download_and_prepare()" in message


@pytest.mark.parametrize(
    "argv",
    [
        ("--features=0",),
        ("--features=8,-1",),
        ("--dataset=circles", "--model=cnn", "--features=4,8"),
        ("--model=cnn", "--features=4,4,4,4,4,8"),  # 8 x 8 pixels are pooled away
        ("--seed=99999999999",),
    ],
)
def test_what_cannot_be_built(refused, argv):
    message = refused(*argv)
    assert any(argument.split("=")[1].split(",")[-1] in message for argument in argv)


@pytest.fixture
def old_run(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "records.jsonl").write_text('{"old": 1}\n')
    return folder


@pytest.mark.parametrize("left", workdir.OUTPUTS)
def test_a_workdir_that_holds_another_run(server, tmp_path, left):
    (tmp_path / left).touch()
    message = server.run(*TINY, f"--workdir={tmp_path}").error()
    assert f"workdir {tmp_path} holds another run" in message
    assert "--overwrite" in message
    assert entries(tmp_path) == [left]


def test_other_files_in_the_workdir_are_no_run(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert workdir.create(str(tmp_path), "compare", overwrite=False) == tmp_path


def test_a_wrong_flag_does_not_overwrite(server, old_run):
    server.run(*TINY, f"--workdir={old_run}", "--overwrite", "--arms=nothing").error()
    assert read_records(old_run / "records.jsonl") == [{"old": 1}]


def test_a_network_that_cannot_be_built_does_not_overwrite(server, old_run):
    server.run(*TINY, f"--workdir={old_run}", "--overwrite", "--features=0")
    assert read_records(old_run / "records.jsonl") == [{"old": 1}]


@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_workdir_that_is_a_file(server, tmp_path, below):
    path = tmp_path / "file"
    path.write_text("mine")
    message = server.run(*TINY, f"--workdir={path}{below}").error()
    assert f"{path}{below}" in message
    assert re.search("is a file: name a folder|Not a directory", message)
    assert path.read_text() == "mine"


def test_a_workdir_that_cannot_be_made(server):
    assert "/proc/runs" in server.run(*TINY, "--workdir=/proc/runs").error()


def test_two_runs_without_a_workdir_in_one_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20300101-000000")
    first = workdir.create(None, "compare", overwrite=False)
    (first / "config.json").touch()
    assert workdir.create(None, "compare", overwrite=False) != first


def test_a_workdir_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = workdir.create("~/runs", "compare", overwrite=False)
    assert folder == tmp_path / "home" / "runs"


def test_the_path_of_the_page_is_printed_as_it_is(finished, server, tmp_path):
    folder = tmp_path / "é [lr] :x:"
    done = server.run(*TINY, "--arms=none", "--seeds=1", f"--workdir={folder}")
    assert (done.code, done.out.splitlines()[-1]) == (0, f"{folder / 'report.html'}")


FULL = """
import errno
from bn_jax import report
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


@pytest.mark.parametrize(("size", "left"), [("4k", 2), ("12k", 2), ("100k", 4)])
def test_a_disk_that_is_full(finished, server, small_disk, size, left):
    """Full at the first record, at a later one, and at a figure."""
    folder = small_disk(size) / "run"
    done = server.run(*TINY, f"--workdir={folder}")
    assert "No space left on device" in done.error()
    assert load(folder / "config.json")["flags"]["seeds"] == 2
    records = without_seconds(folder)
    assert records == without_seconds(finished[1])[: len(records)]
    assert not (folder / "report.html").exists()
    assert len(entries(folder)) == left, entries(folder)
    if left == 4:  # The numbers are whole; it is a figure that is missing.
        assert len(load(folder / "summary.json")["arms"]) == 2


def test_a_disk_that_is_full_is_named(finished, server, small_disk):
    folder = small_disk("4k") / "run"
    assert str(folder) in server.run(*TINY, f"--workdir={folder}").error()


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
    assert entries(tmp_path) == ["config.json", "records.jsonl"]


INTERRUPTED_IN_A_CALLBACK = """
import gc, os, signal

def interrupt(*_):
    if len(records) == 2:
        records.append(None)
        os.kill(os.getpid(), signal.SIGINT)

from bn_jax import report
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
