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
import statistics

from benchmarks.matrices import share
from benchmarks.network import describe
from benchmarks.peers import ours
from benchmarks.peers.process import SIDES, Process, check_sides, programs, sides
from benchmarks.peers.task import Task
from benchmarks.where import describe_machine
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.models import MLP
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import padded
from bn_jax.lab.sweeps.timing import interleave, median_ratio
from bn_jax.linen import BatchNorm

OURS, STEPS = "bn_jax", 50_000
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
    matrix: int = flag(2048, "rows and columns of the matrices")

    def __post_init__(self):
        check_sides(self.sides)


def run(config: Config) -> dict[str, list[float]]:
    """Prints the table and the aims; seconds of every round come back."""
    print(describe_machine("flax", "torch", "keras") + "\n")
    shape = (28, 28, 1)
    task = Task("mlp", config.features, shape, config.images, config.batch, augment=False)
    together = f"{OURS} x {config.runs}"
    cores = f"{together} on cores"
    processes = sides(config.sides, task)
    processes[together] = Process(ours.prepare, task, config.runs)
    processes[cores] = Process(ours.prepare, task, config.runs, ours.START, "cores")
    seconds = interleave(programs(processes, "epoch"), config.rounds)
    for process in processes.values():
        process.close()
    rows, steps = [], {}
    for side, times in seconds.items():
        step = statistics.median(times) / task.steps
        ratio = median_ratio(seconds, side, OURS) if OURS in seconds else float("nan")
        if side.startswith(OURS):
            steps[side] = step / (1 if side == OURS else config.runs)
        rows.append([side, padded(1e3 * step), padded(STEPS * step), f"{ratio:.2f}"])
    print(table(["", "ms a step", f"seconds for {STEPS:,}", "over bn_jax"], rows))
    print(
        f"Aims: {AIM_STEP} ms a step, {config.runs} runs at most {AIM_TOGETHER} "
        f"times {OURS} by one of the two ways.\n"
    )
    network = MLP(task.features, 10, norm=BatchNorm, activation="sigmoid")
    print(share(task.batch * describe(network, shape).flop, steps, config.matrix))
    return seconds


if __name__ == "__main__":
    flags.main(Config, run)
