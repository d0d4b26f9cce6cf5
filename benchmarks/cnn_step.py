"""CIFAR-10's network A: a training step, and an epoch with its input, beside the peers.

Batches of 256, Adam, float32. Every side is in a process of its own, as its users would have
it: ours with what `bn_jax.xla` sets, the peers without. `step` is on one batch in
memory, in float32 already for torch and Keras, in bytes for bn_jax and Flax; `epoch` takes its
images from bytes, shuffled, moved and mirrored (Keras' layers interpolate where the others move
by whole pixels). All sides do one after the other in every round, and ratios are the medians of
those within a round.

Below, the FLOP of a step (XLA's count of its program before optimisation) over its time, as a
share of what one large matrix product reaches here.
"""

from __future__ import annotations

import dataclasses

from benchmarks.machine import describe_machine, share
from benchmarks.network import describe
from benchmarks.peers import Task
from benchmarks.peers.process import OURS, SIDES, Times, sides
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.models import CifarA
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import padded, whole
from bn_jax.linen import BatchNorm

# What bn_jax's images/s are to be, in terms of a peer's.
AIMS = {"plain Flax": 1.5, "torch": 1.1, "Keras on JAX": 2.0}


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.cnn_step --help`."""

    sides: tuple[str, ...] = flag(tuple(SIDES), "what to time, of these")
    features: tuple[int, ...] = flag((32, 64, 128, 512, 128), "of the network")
    image: int = flag(32, "height and width")
    batch: int = flag(256, "images in a step")
    images: int = flag(1280, "of an epoch; CIFAR-10 has 50,000")
    rounds: int = flag(7, "how often each is timed")


def run(config: Config) -> dict[str, Times]:
    """Prints two tables and the share; seconds of every round come back, by program."""
    print(describe_machine("flax", "torch", "keras") + "\n")
    shape = (config.image, config.image, 3)
    task = Task("cifar_a", config.features, shape, config.images, config.batch, augment=True)
    processes = sides(config.sides, task)
    found = {}
    for name, images in (("step", task.batch), ("epoch", task.batch * task.steps)):
        found[name] = times = Times.of(processes, name, config.rounds)
        rows = []
        for side, median in times.medians().items():
            aim = f" (aim {AIMS[side]:g})" if side in AIMS else ""
            ratio = f"{times.ratio(side, OURS):.2f}{aim}"
            rows.append([side, padded(median), whole(images / median), ratio])
        print(
            table(
                [f"{name} of {images:,} images", "seconds", "images/s", "bn_jax over it"], rows
            )
        )
    for process in processes.values():
        process.close()
    if OURS in processes:
        flop = task.batch * describe(CifarA(task.features, norm=BatchNorm), shape).flop
        print(share(flop, {OURS: found["step"].medians()[OURS]}))
    return found


if __name__ == "__main__":
    flags.main(Config, run)
