"""`experiments.cifar_speedrun` for `benchmarks.gpu`: as much of it as there is time for."""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_timer import SKIPPED, Row
from bn_jax.report.files import read_records
from experiments import cifar_speedrun, crossed
from experiments.arms import grid

COMMAND = ("-m", "experiments.cifar_speedrun", "--dtype=bfloat16")
CONFIG = cifar_speedrun.Config()
RECIPE, *OTHERS = cifar_speedrun.ARMS
EXAMPLES = 50_000  # of CIFAR-10, to train on
START = 20.0  # seconds until a process compiles: imports, data, the first use of a GPU


def speedrun(given: Sequence[str], folder: Path, end: float) -> Iterator[Row]:
    """A row for each arm: the recipe with 20 seeds, then the others with as many as fit.

    `seconds` are of a run, with one evaluation; `accuracy` is the mean over the runs at its
    best learning rate. Both are None where there was no run.

    Args:
      given: flags of the experiment.
      folder: for what it leaves; what is finished when the time is spent is kept there.
      end: of `time.monotonic()`; what runs then is stopped.
    """
    records, note = train([RECIPE], CONFIG.seeds, given, folder / RECIPE, end)
    yield row(RECIPE, records, note)
    if not records:
        return
    seeds = seeds_in(end - time.monotonic() - START, records)
    records, note = train(OTHERS, seeds, given, folder / "others", end)
    for arm in OTHERS:
        yield row(arm, records, note)


def train(
    arms: Sequence[str], seeds: int, given: Sequence[str], folder: Path, end: float
) -> tuple[list[dict], str]:
    """Records of the runs that were finished in time, and what was wrong, or "".

    What the process prints goes to stderr.
    """
    left = end - time.monotonic()
    if left <= 0:
        return [], SKIPPED
    command = [
        *COMMAND, f"--arms={','.join(arms)}", f"--seeds={seeds}", f"--workdir={folder}", *given
    ]  # fmt: skip
    print(f"python {shlex.join(command)}", file=sys.stderr, flush=True)
    try:
        status = subprocess.run([sys.executable, *command], stdout=2, timeout=left).returncode
        note = f"ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        note = "out of time"
    path = folder / "records.jsonl"
    return read_records(path) if path.exists() else [], note


def row(arm: str, records: list[dict], note: str) -> Row:
    """Of the runs of that arm at its best point."""
    runs = crossed.best_runs([r for r in records if r["arm"] == arm]).get(arm, [])
    if not runs:
        return {"arm": arm, "seconds": None, "epochs": None, "accuracy": None, "note": note}
    accuracies = [crossed.final(r) for r in runs]
    reached = sum(a >= CONFIG.target for a in accuracies)
    return {
        "arm": arm,
        "seconds": statistics.median(map(cifar_speedrun.run_seconds, runs)),
        "epochs": runs[0]["steps"][-1] / (EXAMPLES // CONFIG.batch_size),
        "accuracy": statistics.fmean(accuracies),
        "note": f"{reached} of {len(runs)} reach {100 * CONFIG.target:.4g} %"
        + (f"; {note}" if note else ""),
    }


def seeds_in(seconds: float, records: list[dict]) -> int:
    """How many the other arms may have, by what the recipe took: between 1 and its own."""
    took = [r["seconds"] for r in records]
    run = statistics.median(s["training"] + s["evaluation"] for s in took)
    known = cifar_speedrun.arms(CONFIG)
    points = sum(len(grid(CONFIG, known[arm])) for arm in OTHERS)
    left = seconds - len(OTHERS) * took[0]["compilation"]
    return min(max(int(left / (points * run)), 1), CONFIG.seeds)
