"""What all experiments share: a tiny run of each, and its command line."""

import dataclasses
import importlib
import io
import json
import shlex
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
from absl import flags as absl_flags

from bn_jax.lab import flags, workdir
from bn_jax.lab.fields import kinds
from bn_jax.lab.findings import Published
from bn_jax.lab.report import read_json, read_records

ONE = {"seeds": 1, "learning_rates": (0.1,)}
# Flags of a tiny run, and the figures that it leaves beside those of every comparison.
TINY = {
    "batch_size": (
        ONE | {"batch_sizes": (1, 256), "arms": ("bn", "group"), "features": (8,),
               "batch_size": 512, "steps": 1, "eval_every": 1, "momentums": (0.9,)},
        {"accuracy.png", "speed.png", "statistics.png"},
    ),
    "cifar_cnn": (
        {"network": "b", "dataset": "digits", "features": (2, 4), "train_examples": 70,
         "epochs": 2},
        {"epochs.png"},
    ),
    "cifar_speedrun": (
        {"quick": True, "arms": ("ghost_32",), "features": (8,), "steps": 42, "eval_every": 21,
         "views": 1, "seeds": 1, "checkpoint_every": 0.0},
        {"accuracy.png", "learning_curves.png"},
    ),
    "circles": (
        {"seeds": 2, "steps": 30, "features": (4,),
         "arms": ("none", "bn_before", "bn_momentum_0")},
        {"decision_regions.png"},
    ),
    "compare": (ONE | {"features": (8,), "steps": 20, "eval_every": 10}, set()),
    "correctness": ({}, None),
    "first_layer": (
        ONE | {"dataset": "digits", "features": (8, 4), "momentums": (0.9,), "steps": 20,
               "eval_every": 10, "arms": ("none", "bn_before"), "raw_learning_rates": (0.01,)},
        set(),
    ),
    "inception": (
        {"quick": True, "arms": ("inception",), "blocks": ("3c",), "width": 0.03125,
         "batch_size": 8, "steps": 4, "eval_every": 2, "train_examples": 16, "ensemble": 1},
        {"ensemble.png"},
    ),
    "learning_rates": (
        {"depths": (2,), "activations": ("relu",), "width": 8, "seeds": 1, "steps": 20,
         "eval_every": 20, "learning_rates": (0.001, 1.0), "init_scales": (1.0, 3.0)},
        {"accuracy.png", "largest_rate.png"},
    ),
    "lstm": (
        {"dataset": "digits", "features": (3,), "steps": 4, "eval_every": 2, "seeds": 1,
         "batch_size": 20, "arms": ("none", "recurrent_.1")},
        {"gradients_through_time.png"},
    ),
    "mnist_sigmoid": (
        {"quick": True, "features": (6,), "seeds": 2, "steps": 60, "eval_every": 20,
         "learning_rates": (0.3, 1e4)},
        {"typical_unit.png", "all_units.png"},
    ),
    "recalibration": (
        {"dataset": "digits", "model": "mlp", "features": (8,), "steps": 6, "seeds": 2,
         "images": (20, 60), "recalibration_batch": 30},
        {"recalibration.png"},
    ),
    "regularisation": (
        {"dataset": "digits", "train_examples": 40, "features": (32,), "arms": ("bn",),
         "dropouts": (0.0, 0.5), "l2s": (0.0,), "learning_rates": (0.1, 0.3), "seeds": 2,
         "steps": 60, "batch_size": 20, "eval_every": 60, "validation_fraction": 0.1},
        {"accuracy_and_gap.png"},
    ),
}  # fmt: skip
COMPARISONS = {"circles", "cifar_cnn", "compare", "first_layer", "inception", "lstm",
               "mnist_sigmoid"}  # fmt: skip
RUN = {"arm", "learning_rate", "init_scale", "momentum", "seed", "steps", "diverged_at",
       "stopped_at", "seconds"}  # fmt: skip
RUN |= {
    f"{split}_{k}" for split in ("train", "validation", "test") for k in ("loss", "accuracy")
}
ARM = {"arm", "learning_rate", "seeds", "reached", "steps_to_target", "seconds_to_target",
       "max_accuracy", "diverged"}  # fmt: skip


def load(name):
    return importlib.import_module(f"experiments.{name}")


def run(module, config):
    """The summary, and what was printed."""
    with redirect_stdout(io.StringIO()) as written, redirect_stderr(io.StringIO()):
        summary = module.run(config)
    return json.loads(json.dumps(summary)), written.getvalue()


def parsed(config, command):
    """The config that the words of a command give."""
    values = absl_flags.FlagValues()
    flags.define(config, values)
    assert values(shlex.split(command)[2:])[1:] == []  # nothing but flags
    return flags.given(config, values)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_run(name, tmp_path, monkeypatch):
    if name == "correctness":
        few(monkeypatch)
    module, (given, figures) = load(name), TINY[name]
    folder = tmp_path / "w"
    config = module.Config(**given, workdir=str(folder))
    summary, written = run(module, config)
    assert written.rstrip().endswith(str(folder / "report.html"))
    assert read_json(folder / "summary.json") == summary
    check_figures(folder, figures, name in COMPARISONS)
    check_config(folder, config, name)
    records = read_records(folder / "records.jsonl")
    if name not in ("correctness", "recalibration"):
        check_records(records, summary, config)
    for row in summary.get("published", ()):
        assert Published.from_json(row).to_json() == row
        assert row.get("agrees") in (True, False, None)
        # A tiny run is not the source's; these judge a claim in runs of any size.
        any_size = name in ("batch_size", "inception", "learning_rates", "regularisation")
        assert any_size or row.get("agrees") is None, row
    EFFECTS.get(name, lambda summary, records: None)(summary, records)
    check_resumed(module, config, folder, summary, records)


def check_figures(folder, figures, compares):
    page = (folder / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    if figures is None:
        return
    captions = read_json(folder / "figures" / "captions.json")
    left = {path.name for path in (folder / "figures").glob("*.png")}
    assert left == {*captions}
    assert left >= figures
    assert bool(left - figures) == compares
    assert page.count("data:image/png;base64,") == len(left)
    for name in left:
        assert (folder / "figures" / name).read_bytes().startswith(b"\x89PNG")


def check_config(folder, config, name):
    left = read_json(folder / "config.json")
    assert left["experiment"] == name
    assert {*left["flags"]} == {f.name for f in dataclasses.fields(config)}
    assert left["versions"]["jax"]
    assert {"devices", "machine", "git_commit"} <= {*left}
    assert left["command"].startswith(f"python -m experiments.{name}")
    again = dataclasses.replace(parsed(type(config), left["command"]), workdir=config.workdir)
    place = {n: getattr(config, n) for n in workdir.PLACE if hasattr(config, n)}
    assert dataclasses.replace(again, **place) == config


def check_records(records, summary, config):
    assert all({*r} >= RUN for r in records)
    runs = [(r["arm"], r["learning_rate"], r["init_scale"], r["seed"]) for r in records]
    assert len(set(runs)) == len(runs)
    assert {r["seed"] for r in records} >= {*range(config.seed, config.seed + config.seeds)}
    assert all(len(r["test_loss"]) == len(r["steps"]) for r in records)
    assert {"experiment", "question", "dataset", "model", "seconds"} <= {*summary}
    assert all({*arm} >= ARM for arm in summary.get("arms", ()))
    assert all({"title", "header", "rows"} == {*table} for table in summary.get("tables", ()))
    for entry in summary.get("speedup", ()):
        assert {*entry} == {"arm", "over", "steps", "seconds"}


def check_resumed(module, config, folder, summary, records):
    """What is missing is made again, and nothing is trained or asked again."""
    (folder / "report.html").unlink()
    found, _ = run(module, config)
    for one in (found, summary):
        one.pop("seconds", None)
        one["published"] = [row["quantity"] for row in one.get("published", ())]  # has times
    assert found == summary
    assert read_records(folder / "records.jsonl") == records
    assert (folder / "report.html").exists()


def recalibrated(summary, records):
    """More images err less, and all of them not at all."""
    for weights in ("last", "average"):
        arms = [a for a in summary["arms"] if a["weights"] == weights]
        assert [a["images"] for a in arms] == [0, 20, 60, summary["training_images"]]
        running, few, more, everything = (a["statistics_error"]["median"] for a in arms)
        # Six updates with momentum .99 leave 94 % of mean 0 and variance 1.
        assert running > few > more > everything == 0
        for arm in arms:
            own = [
                r["test_accuracy"] for r in records
                if (r["weights"], r["images"]) == (weights, arm["images"])
            ]  # fmt: skip
            assert (len(own), arm["test_accuracy"]["range"]) == (2, [min(own), max(own)])


def learnt_by_heart(summary, records):
    """Thirty epochs of 40 examples: the gap is what the test accuracy lacks."""
    kept, dropped = summary["combinations"]
    assert (kept["dropout"], dropped["dropout"]) == (0.0, 0.5)
    assert kept["test_accuracy"]["median"] + kept["gap"]["median"] == pytest.approx(1)
    assert kept["gap"]["median"] > 0.05


def refused(summary, records):
    """A batch of 1, by BatchNorm; all runs see as many examples."""
    found = {(c["norm"], c["batch_size"]): c for c in summary["combinations"]}
    assert [cell for cell, c in found.items() if c["refused"]] == [("bn", 1)]
    last = {r["arm"]: r["steps"][-1] for r in records}
    assert last == {"bn 256": 2, "group 1": 512, "group 256": 2}
    assert found["group", 1]["batch_statistics"] is None
    assert 0 <= found["bn", 256]["batch_statistics"]["median"] <= 1


def drifted(summary, records):
    """There is a drift for every rate, and for each arm at its best."""
    drift = summary["drift"]
    rates = [[arm["learning_rate"] for arm in row["arms"]] for row in drift["by_rate"]]
    assert (drift["images"], rates) == (450, [[0.3, 0.3], [1e4, 1e4]])
    for arm, best in zip(drift["arms"], summary["arms"], strict=True):
        assert (arm["arm"], arm["learning_rate"]) == (best["arm"], best["learning_rate"])
        assert arm["median"] > 0


def reached(summary, records):
    """The gradient of every step, before training and after."""
    assert summary["variant"] == "rows"
    for ends in summary["gradient_norms"].values():
        assert [len(ends[end]) for end in ("start", "end")] == [8, 8]
        assert all(v > 0 for v in ends["start"])
        assert ends["start"] != ends["end"]


def averaged(summary, records):
    """Of one network the mean is the network, and no better."""
    *_, one, together = summary["published"]
    assert one["here"] == together["here"]
    assert together["agrees"] is False


def slow(summary, records):
    """20 steps of a thousandth are no training."""
    assert len(records) == 2 * 4
    points = [p for p in summary["by_point"] if p["learning_rate"] == 0.001]
    assert points
    assert not any(p["trains"] for p in points)


def at_own_momentum(summary, records):
    momentums = {arm["arm"]: arm["momentum"] for arm in summary["arms"]}
    assert momentums == {"none": None, "bn_before": 0.99, "bn_momentum_0": 0.0}
    assert summary["at_same_learning_rate"] is None


def in_epochs(summary, records):
    """An epoch is all examples but those left over: 70, in batches of 32."""
    assert all(r["steps"] == [0, 2, 4] for r in records)
    assert {a["arm"]: a["learning_rate"] for a in summary["arms"]} == {"none": 1e-4, "bn": 1e-3}


def asked(summary, records):
    """Each framework that is there in every case, and what it gets right is counted."""
    for framework in summary["frameworks"]:
        given = [r["right"] for r in records if r["framework"] == framework["name"]]
        assert (framework["right"], framework["cases"]) == (sum(given), len(given))
        assert framework["installed"] == (len(given) == 6)
    cases = {c["number"]: c for defect in summary["defects"] for c in defect["cases"]}
    for r in records:
        assert cases[r["case"]]["answers"][r["framework"]]["value"] == r["value"]


def folded(summary, records):
    *_, difference = summary["published"]
    assert "largest difference" in difference["quantity"]
    assert float(difference["here"]) < 1e-4
    rates = {a["arm"]: a["learning_rate"] for a in summary["arms"]}
    assert rates == {"none": 0.01, "bn_before": 0.1}


EFFECTS = {
    "batch_size": refused, "cifar_cnn": in_epochs, "circles": at_own_momentum,
    "correctness": asked, "first_layer": folded, "inception": averaged,
    "learning_rates": slow, "lstm": reached, "mnist_sigmoid": drifted,
    "recalibration": recalibrated, "regularisation": learnt_by_heart,
}  # fmt: skip


def few(monkeypatch):
    """Two defects with the frameworks that are always there."""
    from experiments import defects
    from experiments.defects import case

    found = defects.defects()
    monkeypatch.setattr(defects, "defects", lambda: [found[0], found[5]])
    for module in (defects, case):
        monkeypatch.setattr(module, "installed", {"bn_jax", "flax linen"}.__contains__)


@pytest.mark.parametrize("name", [*TINY, "imagenet", "make_report"])
def test_help_names_every_flag_within_a_second(name, environment):
    start = time.perf_counter()
    words = [sys.executable, "-X", "importtime", "-m", f"experiments.{name}", "--help"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "flax", "optax", "matplotlib", "orbax"}, seconds
    for flag in kinds(load(name).Config):
        assert f"--{flag}" in done.stdout or f"--[no]{flag}" in done.stdout


@pytest.mark.parametrize("name", [n for n in TINY if n != "correctness"])
def test_quick_changes_defaults_alone(name):
    config = load(name).Config
    default, quick = config(), config(quick=True)
    changed = {
        f.name for f in dataclasses.fields(config)
        if getattr(default, f.name) != getattr(quick, f.name)
    }  # fmt: skip
    assert "quick" in changed
    assert changed - {"quick"} <= {*config.QUICK, "dataset", "features"}
    given = {k: v for k in changed - {"quick"} if (v := getattr(default, k)) is not None}
    back = config(quick=True, **given)
    assert {k: getattr(back, k) for k in given} == given
    command = workdir.command(quick, name)
    assert command == f"python -m experiments.{name} --quick=True"
    assert parsed(config, command) == quick
