"""What a training step sends over the network, and what that costs on 8 to 4,096 chips.

Of a network with P parameters and BatchNorms of C features each, statistics shared by g of n
chips, a step has these all-reduces, of float32 numbers:

    gradients        1        P                 over all n
    BN, forward      2 each   C + 1, then C     over g
    BN, backward     1 each   2 C               over g
    running          0        n (2 C + 1) each  over all n, where g < n

The last are the running statistics of a `GhostBatchNorm`: every chip learns those of every
group; XLA sends them with the gradients. The numbers are read off the networks themselves
(FLOP: XLA's count of the step's program), and the time of a step is projected from published
figures (`benchmarks.machines`) and `Assumptions`:

    examples per chip x FLOP per example / (peak x utilisation) + all-reduces, one by one

`python -m benchmarks.network` prints both as Markdown; nothing is measured.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from benchmarks.machines import MACHINES, TPU_V3_PEAK, Switched, Torus, sent
from benchmarks.payload import Network, describe
from bn_jax.errors import UserError
from bn_jax.linen import BatchNorm
from bn_jax.models import CifarA, Inception, ResNet50
from bn_jax.report.markdown import table
from bn_jax.report.text import padded, whole
from experiments import flags
from experiments.flags import flag

MODELS = {
    "ResNet-50": (ResNet50(norm=BatchNorm), (224, 224, 3)),
    "BN-Inception": (Inception(norm=BatchNorm), (224, 224, 3)),
    "CifarA": (CifarA(norm=BatchNorm), (32, 32, 3)),
}


class Assumptions(NamedTuple):
    """What is not read off a network or a machine.

    Attributes:
      examples_per_chip: Goyal et al. 2017: 8,192 on 256 GPUs.
      largest_batch: to here ResNet-50 trains without loss of accuracy (You et al. 2017,
        "Large Batch Training of Convolutional Networks").
      examples_per_statistic: "ideal [...] seems to be about 128", of ResNets:
        https://github.com/google/flax/pull/42
      images_per_second, chips: of ResNet-50 on TPU v3 (Ying et al. 2018, "Image
        Classification at Supercomputer Scale"). That share of the peak, all-reduces
        included, is taken for every network and machine.
    """

    examples_per_chip: int = 32
    largest_batch: int = 32_768
    examples_per_statistic: int = 128
    images_per_second: float = 1.05e6
    chips: int = 1024

    def examples(self, chips: int) -> int:
        """On each of so many chips."""
        return max(1, min(self.examples_per_chip, self.largest_batch // chips))

    def group(self, chips: int) -> int:
        """How many of so many chips share: the most that have no more examples than enough."""
        most = max(1, self.examples_per_statistic // self.examples(chips))
        return max(g for g in range(1, min(most, chips) + 1) if chips % g == 0)

    def utilisation(self, flop: float) -> float:
        """The share of the peak, given the FLOP of ResNet-50 per example of a step."""
        return self.images_per_second * flop / (self.chips * TPU_V3_PEAK)


class Step(NamedTuple):
    """Seconds of a training step, by what takes them."""

    compute: float
    gradients: float
    norms: float
    running: float


def project(
    network: Network, machine: Switched | Torus, chips: int, group: int, examples: int,
    utilisation: float,
) -> Step:  # fmt: skip
    """A step on `chips`, each with so many examples, `group` of which share statistics."""
    alone = machine.all_reduce(network.gradients(), chips)
    running = network.running(chips) if group < chips else 0
    return Step(
        examples * network.flop / (machine.peak * utilisation),
        alone,
        sum(machine.all_reduce(payload, group) for payload in network.norms()),
        machine.all_reduce(network.gradients() + running, chips) - alone,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Every flag of the benchmark; see `python -m benchmarks.network --help`."""

    models: tuple[str, ...] = flag(tuple(MODELS), f"of {', '.join(MODELS)}")
    chips: tuple[int, ...] = flag((8, 256, 4096), "how many there are; powers of two")

    def __post_init__(self):
        for name in self.models:
            if name not in MODELS:
                raise UserError(f"--models: {name!r} is none of {', '.join(MODELS)}")
        for chips in self.chips:
            if chips < 2 or chips & (chips - 1):
                raise UserError(f"--chips: {chips} is none of 2, 4, 8, ...")


def run(config: Config) -> list[dict[str, Any]]:
    """Prints a table of what is sent, and one of times for each network; their rows."""
    assumed = Assumptions()
    known = {name: describe(name, *MODELS[name]) for name in {"ResNet-50", *config.models}}
    utilisation = assumed.utilisation(known["ResNet-50"].flop)
    networks = [known[name] for name in config.models]
    print(what_is_sent(networks, config.chips[0]))
    print(
        f"Chips reach {100 * utilisation:.1f} % of their peak. Recommended (bold): as many "
        f"chips share as have {assumed.examples_per_statistic} examples, or fewer."
    )
    rows = []
    for network in networks:
        new = projections(network, config.chips, utilisation, assumed)
        print(f"\n{network.name}, milliseconds of a step:\n")
        print(steps(new), end="")
        rows += new
    return rows


def projections(
    network: Network, chips: tuple[int, ...], utilisation: float, assumed: Assumptions
) -> list[dict[str, Any]]:
    """A row for each machine, number of chips, and number of these that share."""
    rows = []
    for machine in MACHINES:
        for n in chips:
            examples, best = assumed.examples(n), assumed.group(n)
            for group in sorted({1, best, n}):
                step = project(network, machine, n, group, examples, utilisation)
                rows.append({
                    "model": network.name, "machine": machine.name, "chips": n,
                    "examples": examples, "group": group, "recommended": group == best,
                    **step._asdict(),
                })  # fmt: skip
    return rows


def what_is_sent(networks: list[Network], chips: int) -> str:
    """A line for each network; last what one of so many chips sends if all share."""
    header = [
        "network", "parameters", "BN layers", "their features", "GFLOP/example", "all-reduces",
        "gradients (MB)", "BN (kB)", "running (kB/chip)", f"1 of {chips} sends (MB)",
    ]  # fmt: skip
    lines = []
    for network in networks:
        gradients, norms = network.gradients(), sum(network.norms())
        lines.append([
            network.name, whole(network.parameters), whole(len(network.features)),
            whole(sum(network.features)), padded(network.flop / 1e9),
            whole(1 + len(network.norms())), padded(gradients / 1e6), padded(norms / 1e3),
            padded(network.running(1) / 1e3), padded(sent(gradients + norms, chips) / 1e6),
        ])  # fmt: skip
    return table(header, lines)


def steps(rows: list[dict[str, Any]]) -> str:
    """A line for each row, of one network; last the step over computing and gradients."""
    header = [
        "machine", "chips", "examples/chip", "chips that share", "examples/statistic",
        "compute", "gradients", "BN", "running", "step", "to the first two",
    ]  # fmt: skip
    lines = []
    for row in rows:
        parts = [row[name] for name in Step._fields]
        group = whole(row["group"])
        lines.append([
            row["machine"], whole(row["chips"]), whole(row["examples"]),
            f"**{group}**" if row["recommended"] else group,
            whole(row["group"] * row["examples"]),
            *(padded(1e3 * seconds) for seconds in (*parts, sum(parts))),
            f"{sum(parts) / (row['compute'] + row['gradients']):.2f}",
        ])  # fmt: skip
    return table(header, lines)


if __name__ == "__main__":
    flags.main(Config, run)
