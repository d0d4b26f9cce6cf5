"""Kills an experiment at random moments, and starts it again until it ends."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from programs import TINY, Server

from bn_jax.lab.report import read_records

FLAGS = ("--arms=bn", *TINY, "--checkpoint_every=0", "--patience=2")
# What is left are the last weights of all runs, as a watcher had kept them; no page.
PROGRAM = """
import jax, numpy as np
from bn_jax.lab import experiment, flags
from experiments import compare
from bn_jax.lab.arms import chosen_arms, norm_arms
from bn_jax.lab.experiment import run_experiment
from bn_jax.lab.findings import Findings
from bn_jax.lab.watchers import Weights
from pathlib import Path

def run(config):
    weights = Weights()
    def conclude(training):
        arrays = {str((*k, i)): np.asarray(v) for k, tree in weights.kept.items()
                  for i, v in enumerate(jax.tree.leaves(tree))}
        np.savez(Path(config.workdir) / "weights.npz", **arrays)
        return Findings()
    return run_experiment(config, chosen_arms(config.arms, norm_arms()), experiment="compare",
                   question="", conclude=conclude, watch=weights)

def write(records, summary, settings, folder, figures):
    for name in ("summary.json", "report.html"):
        (folder / name).write_text("{}")

experiment.write = write

flags.main(compare.Config, run)
"""


def records(folder):
    found = read_records(folder / "records.jsonl")
    return [{k: v for k, v in r.items() if k != "seconds"} for r in found]


def assert_same(folder, expected):
    assert records(folder) == records(expected)
    weights, others = (np.load(f / "weights.npz") for f in (folder, expected))
    assert len(weights.files) >= 4 * 4
    for name in others.files:
        np.testing.assert_array_equal(weights[name], others[name], err_msg=name)


def unfinished(folder):
    """Saves that were not, by their time."""
    return {(p, p.stat().st_ctime_ns) for p in folder.glob("checkpoints/*tmp*")}


class Kills(NamedTuple):
    """How many there were, how many of them inside a save, and of how many runs."""

    kills: int
    inside: int
    runs: int


def kill(server: Server, folder: Path, kills: int, expected: Path, seconds: float) -> Kills:
    """Each run ends with what the `expected` one left; it takes `seconds` undisturbed.

    As often as it takes: a run that ends before it is killed makes room for another.
    """
    rng, number, inside = random.Random(0), 0, 0
    for i in range(kills):
        flags = (*FLAGS, f"--workdir={folder / str(number)}")
        before = unfinished(folder / str(number))
        pid = server.start(*flags, code=PROGRAM)
        # Importing and reading what is compiled comes first.
        time.sleep(rng.uniform(0.5, 1.1) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        done = server.wait()
        assert done.code in (0, -signal.SIGKILL), done
        inside += bool(unfinished(folder / str(number)) - before)
        if done.code == 0 or i == kills - 1:
            assert server.run(*flags, code=PROGRAM).code == 0
            assert_same(folder / str(number), expected)
            number += 1
    return Kills(kills, inside, number)
