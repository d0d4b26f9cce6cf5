"""What a training step sends over the network, and what that costs on 8 to 4,096 chips.

docs/scaling.md has the formulas, the table and the sources of all figures. P, C and the FLOP
(XLA's count of the step's program) are read off the networks. Nothing is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.models import Inception, ResNet50
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import padded, whole
from bn_jax.linen import BatchNorm

FLOAT = 4  # bytes
MODELS = {"ResNet-50": ResNet50(norm=BatchNorm), "BN-Inception": Inception(norm=BatchNorm)}
# docs/scaling.md has the sources: examples on a chip and at most in all, examples that share
# statistics, ResNet-50's images/s on TPU v3 and these chips' peak FLOP/s.
EXAMPLES, LARGEST_BATCH, SHARING = 32, 32_768, 128
PUBLISHED, THEIR_PEAK = 1.05e6, 1024 * 1.23e14


class Network(NamedTuple):
    """Parameters, the features of each BatchNorm, FLOP of a training step per example."""

    parameters: int
    features: tuple[int, ...]
    flop: float

    def norms(self) -> list[int]:
        """Bytes of every all-reduce of the BatchNorms."""
        return [FLOAT * count for c in self.features for count in (c + 2, c, 2 * c)]

    def running(self, chips: int) -> int:
        """Bytes by which every chip learns the running statistics of every group."""
        return FLOAT * chips * sum(2 * c + 2 for c in self.features)


def describe(model: nn.Module, image: tuple[int, ...]) -> Network:
    """The network of a model of images `[height, width, channels]`; nothing is computed."""
    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)

    def loss(params, variables, images):
        rngs = {"dropout": jax.random.key(0)}
        given = {**variables, "params": params}
        return model.apply(given, images, train=True, mutable=True, rngs=rngs)[0].sum()

    lowered = jax.jit(jax.grad(loss)).lower(variables["params"], variables, images)
    stats = traverse_util.flatten_dict(variables["batch_stats"])
    return Network(
        sum(v.size for v in jax.tree.leaves(variables["params"])),
        tuple(v.size for path, v in stats.items() if path[-1] == "mean"),
        lowered.cost_analysis()["flops"] / images.shape[0],
    )


def h100(payload: float, chips: int) -> float:
    """Seconds of an all-reduce over DGX H100 nodes of 8: the quickest of NCCL's three ways."""
    nodes = math.ceil(chips / 8)
    bandwidth = 450e9 if nodes == 1 else 400e9
    far = 2 * nodes if nodes > 1 else 0
    steps = (2 * (chips - 1) - far) * 3.4e-6 + far * 14e-6
    ring = 8.4e-6 + steps + sent(payload, chips) / bandwidth
    up, along = 2 * math.log2(nodes), 2 * (chips // nodes - 1)
    tree = (up + along) * 28e-6 + 2 * payload / (0.92 * bandwidth)
    small = 6.8e-6 + along * 0.6e-6 + up * 5e-6 + 2 * payload / 19e9
    return min(ring, tree, small)


def tpu_v4(payload: float, chips: int) -> float:
    """Seconds over a block of a TPU v4: reduce-scatter and all-gather on all axes at once.

    From 4 x 4 x 4 on the axes are rings: half the hops, and both links of an axis at work.
    """
    power = chips.bit_length() - 1
    sides = [2 ** ((power + i) // 3) for i in range(3)]
    closed, axes = chips >= 64, sum(side > 1 for side in sides)
    hops = sum(side // 2 if closed else side - 1 for side in sides)
    return 2 * hops * 1e-6 + sent(payload, chips) / ((1 + closed) * axes * 45e9)


# Peaks in bfloat16 FLOP/s.
MACHINES = {"DGX H100": (9.9e14, h100), "TPU v4": (2.75e14, tpu_v4)}


def sent(payload: float, chips: int) -> float:
    """Bytes that each chip sends in an all-reduce by a ring; no algorithm sends less."""
    return 2 * (chips - 1) / chips * payload


def examples(chips: int) -> int:
    """On each of so many chips."""
    return max(1, min(EXAMPLES, LARGEST_BATCH // chips))


def shared(chips: int) -> int:
    """How many of so many chips share statistics, of `SHARING` examples at most."""
    return min(chips, max(1, SHARING // examples(chips)))


def project(network: Network, machine: str, chips: int, group: int, used: float) -> list[float]:
    """Milliseconds of a step: computing, gradients, BatchNorms, running statistics."""
    peak, all_reduce = MACHINES[machine]
    gradients, norms = FLOAT * network.parameters, network.norms() if group > 1 else []
    running = network.running(chips) if group < chips else 0
    alone = all_reduce(gradients, chips)
    computing = examples(chips) * network.flop / (peak * used)
    shares = sum(all_reduce(payload, group) for payload in norms)
    together = all_reduce(gradients + running, chips)
    return [1e3 * s for s in (computing, alone, shares, together - alone)]


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.network --help`."""

    image: int = flag(224, "height and width")


def run(config: Config) -> None:
    """Prints what is sent, and a line of times for each case."""
    found = {name: describe(m, (config.image, config.image, 3)) for name, m in MODELS.items()}
    header = ["network", "parameters", "BN layers", "features", "GFLOP/example", "all-reduces",
              "gradients (MB)", "BN (kB)", "running (kB/chip)"]  # fmt: skip
    print(table(header, [
        [name, whole(n.parameters), whole(len(n.features)), whole(sum(n.features)),
         padded(n.flop / 1e9), whole(1 + len(n.norms())), padded(FLOAT * n.parameters / 1e6),
         padded(sum(n.norms()) / 1e3), padded(n.running(1) / 1e3)]
        for name, n in found.items()
    ]))  # fmt: skip
    used = PUBLISHED * found["ResNet-50"].flop / THEIR_PEAK
    print(f"Chips reach {used:.1%} of their peak. Milliseconds of a step:\n")
    lines = []
    for (name, network), machine in itertools.product(found.items(), MACHINES):
        for chips in (8, 256, 4096):
            for group in sorted({1, shared(chips), chips}):
                parts = project(network, machine, chips, group, used)
                marked = f"**{group}**" if group == shared(chips) else whole(group)
                ratio = f"{sum(parts) / sum(parts[:2]):.2f}"
                times = map(padded, (*parts, sum(parts)))
                lines.append([f"{name}, {machine}", whole(chips), marked, *times, ratio])
    print(table(["", "chips", "that share", "compute", "gradients", "BN", "running", "step",
                 "to the first two"], lines), end="")  # fmt: skip


if __name__ == "__main__":
    flags.main(Config, run)
