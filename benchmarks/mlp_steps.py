"""The paper's MNIST network: a training step beside the peers', and five runs at once.

Three layers of 100 sigmoids with BatchNorm before each, batches of 60 images of 28 x 28 bytes,
plain SGD (Ioffe & Szegedy 2015, section 4.1: 50,000 steps). A side trains on all images once in
every round, shuffled, in a process of its own; ratios are the medians of those within a round.
`bn_jax x 5` trains five seeds in one program (`--parallel=single`), `on cores` one on each core
at a time (`--parallel=cores`, which is what `auto` chooses for this network).

Below, the FLOP of a step (XLA's count of its program before optimisation) over its time, as a
share of what one large matrix product reaches here: what one run leaves is all that others
beside it can gain.
"""

from __future__ import annotations

import dataclasses

from benchmarks.machine import describe_machine, share
from benchmarks.network import describe
from benchmarks.peers import Task, ours
from benchmarks.peers.process import OURS, SIDES, Process, Times, sides
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.models import MLP
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import padded
from bn_jax.linen import BatchNorm

STEPS = 50_000
AIM_STEP, AIM_TOGETHER = 0.4, 3  # milliseconds; times one run


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.mlp_steps --help`."""

    sides: tuple[str, ...] = flag(tuple(SIDES), "what to time, of these")
    features: tuple[int, ...] = flag((100, 100, 100), "widths of the hidden layers")
    batch: int = flag(60, "images in a step")
    images: int = flag(60_000, "that are trained on in a round")
    runs: int = flag(5, "that are trained at once")
    rounds: int = flag(7, "how often each is timed")


def run(config: Config) -> Times:
    """Prints the table and the aims; seconds of every round come back."""
    print(describe_machine("flax", "torch", "keras") + "\n")
    shape = (28, 28, 1)
    task = Task("mlp", config.features, shape, config.images, config.batch)
    together = f"{OURS} x {config.runs}"
    processes = sides(config.sides, task) | {
        together: Process(ours.prepare, task, config.runs),
        f"{together} on cores": Process(ours.prepare, task, config.runs, ours.START, "cores"),
    }
    times = Times.of(processes, "epoch", config.rounds)
    for process in processes.values():
        process.close()
    steps = {side: median / task.steps for side, median in times.medians().items()}
    rows = [
        [side, padded(1e3 * s), padded(STEPS * s), f"{times.ratio(side, OURS):.2f}"]
        for side, s in steps.items()
    ]
    print(table(["", "ms a step", f"seconds for {STEPS:,}", "over bn_jax"], rows))
    print(
        f"Aims: {AIM_STEP} ms a step, {config.runs} runs at most {AIM_TOGETHER} "
        f"times {OURS} by one of the two ways.\n"
    )
    network = MLP(task.features, 10, norm=BatchNorm, activation="sigmoid")
    of_a_run = {
        side: s / (config.runs if side.startswith(together) else 1)
        for side, s in steps.items()
        if side.startswith(OURS)
    }
    print(share(task.batch * describe(network, shape).flop, of_a_run))
    return times


if __name__ == "__main__":
    flags.main(Config, run)
