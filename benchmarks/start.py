"""How long a process takes to start: imports, `--help`, a first step and the next one.

Whole commands, from start to end, one after the other in every round; the median counts. The
comparison trains one step of two arms on digits and writes everything that a comparison leaves;
its compiled programs are kept in a folder that is empty at first (`bn_jax.xla`,
by default in the user's cache directory). What jax and flax take by themselves stands beside.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe_machine
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import padded

COMPARE = (
    "-m", "experiments.compare", "--steps=1", "--eval_every=1", "--seeds=1",
    "--learning_rates=1",
)  # fmt: skip
IMPORTS = ("jax", "flax.linen", "bn_jax", "bn_jax.linen", "bn_jax.nnx")
FIRST, AGAIN = "first step of compare", "the same again"
# Seconds, on two cores.
AIMS = {"import bn_jax": 1.5, "compare --help": 2.0}


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.start --help`."""

    rounds: int = flag(7, "how often each is timed, after one that does not count")


def run(config: Config) -> dict[str, list[float]]:
    """Prints a table; seconds of every round come back."""
    print(describe_machine("flax") + "\n")
    with tempfile.TemporaryDirectory() as folder:
        seconds = time_all(Path(folder), config.rounds)
    rows = [
        [name, padded(statistics.median(times)), f"{AIMS[name]:g}" if name in AIMS else ""]
        for name, times in seconds.items()
    ]
    print(table(["", "seconds", "aim"], rows))
    return seconds


def time_all(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of every command, in an order drawn anew for each round."""
    compare = (*COMPARE, f"--cache_dir={folder / 'cache'}", "--overwrite")
    commands = {f"import {name}": ("-c", f"import {name}") for name in IMPORTS} | {
        "compare --help": (*COMPARE[:2], "--help"),
        FIRST: (*compare, f"--workdir={folder / 'first'}"),
        AGAIN: (*compare, f"--workdir={folder / 'again'}"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    order = random.Random(0)
    for _ in range(1 + rounds):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        names = [name for name in order.sample(list(commands), len(commands)) if name != AGAIN]
        names.insert(names.index(FIRST) + 1, AGAIN)
        for name in names:
            seconds[name].append(timed(commands[name]))
    return {name: times[1:] for name, times in seconds.items()}


def timed(arguments: tuple[str, ...]) -> float:
    """Seconds of a Python process, which may keep its bytecode as it does by default.

    Raises:
      subprocess.CalledProcessError: it failed; absl's `--help` has exit status 1.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True)
    seconds = time.perf_counter() - start
    if "--help" not in arguments:
        done.check_returncode()
    return seconds


if __name__ == "__main__":
    flags.main(Config, run)
