"""`layer`, `cnn_step` and the speed run, one after another, within a few minutes.

For a machine that is lent for minutes: each is a process of its own, is stopped when the time
is spent, and what it printed until then stays. CIFAR-10 comes to a machine without a network as
what `bn_jax.lab.data` has cached (`~/.cache/bn_jax/cifar10-...`, 185 MB).
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

from bn_jax.lab import flags
from bn_jax.lab.fields import flag

PROGRAMS = (
    ("benchmarks.layer", "--shapes=256x112x112x64,256x56x56x256,256x14x14x1024", "--rounds=20"),
    ("benchmarks.cnn_step", "--sides=bn_jax,plain Flax", "--images=25600"),
    ("experiments.cifar_speedrun", "--dtype=bfloat16", "--arms=bn", "--workdir=runs/gpu"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.gpu --help`."""

    minutes: float = flag(8.0, "for all of them")


def run(config: Config) -> None:
    """Prints what each prints, and how it ended."""
    end = time.monotonic() + 60 * config.minutes
    for name, *given in PROGRAMS:
        print(f"\n## python -m {name} {' '.join(given)}", flush=True)
        command = [sys.executable, "-m", name, *given]
        try:
            done = subprocess.run(command, timeout=max(end - time.monotonic(), 0))
            print(f"exit status {done.returncode}")
        except subprocess.TimeoutExpired:
            print("out of time")


if __name__ == "__main__":
    flags.main(Config, run)
