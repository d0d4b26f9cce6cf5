"""How time and memory of training grow: with the batch, the width, the runs, the BatchNorms.

The paper's network (dense layers of sigmoids with BatchNorm before each, SGD; inputs of 100
numbers) as sweeps train it: on a CPU one run on each core at a time, else all in one program.
One size grows from its base by factors of two, the others stay at theirs; as the base has one
hidden layer, its parameters grow as its width. Time is that of a step of all runs, the median
of rounds in which every size has its turn; memory is what the compiled programs hold:
arguments, results (but for those that take an argument's place) and temporaries. `growth` is
the exponent that the last doubling shows: 1 is linear, 0 constant.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers import ours
from benchmarks.peers.task import Task
from benchmarks.where import describe_machine
from bn_jax.errors import UserError
from bn_jax.measure.timing import interleave
from bn_jax.report.markdown import table
from bn_jax.report.plotting import new_figure, tidy
from bn_jax.report.text import padded, whole
from bn_jax.training.xla import set_up
from experiments import flags
from experiments.flags import flag

INPUTS = 100


class Size(NamedTuple):
    """What grows: examples of a batch, width of a layer, runs at once, BatchNorms."""

    batch: int = 64
    width: int = 64
    runs: int = 8
    layers: int = 1


NAMES = {
    "batch": "examples in a batch", "width": "width of a layer", "runs": "runs at once",
    "layers": "BatchNorms",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.scaling --help`."""

    doublings: int = flag(6, "how often each size is doubled")
    steps: int = flag(40, "that are timed at once")
    rounds: int = flag(7, "how often everything is timed")
    figure: str | None = flag(None, "PNG to write; by default there is none")

    def __post_init__(self):
        if min(self.doublings, self.steps, self.rounds) < 1:
            raise UserError("--doublings, --steps and --rounds must be at least 1")


class Measured(NamedTuple):
    """Of one size: seconds of a step, and bytes."""

    seconds: float
    memory: int


def run(config: Config) -> dict[str, dict[int, Measured]]:
    """Prints a table for each size; what was measured comes back, by name and size."""
    set_up()
    print(describe_machine() + "\n")
    found = {name: measure(name, config) for name in Size._fields}
    for name, rows in found.items():
        print(lines(name, rows))
    if config.figure:
        figure(found).savefig(Path(config.figure).expanduser(), dpi=110)
    return found


def measure(name: str, config: Config) -> dict[int, Measured]:
    """All sizes of one name, timed side by side."""
    base = getattr(Size(), name)
    values = [base * 2**i for i in range(config.doublings + 1)]
    programs = {v: trainer(Size()._replace(**{name: v}), config.steps) for v in values}
    seconds = interleave({str(v): go for v, (go, _) in programs.items()}, config.rounds)
    return {
        v: Measured(statistics.median(seconds[str(v)]) / config.steps, memory)
        for v, (_, memory) in programs.items()
    }


def trainer(size: Size, steps: int) -> tuple[Callable[[], Any], int]:
    """A call that trains all runs for so many steps, and the bytes of its program."""
    features, images = (size.width,) * size.layers, size.batch * steps
    task = Task("mlp", features, (1, INPUTS, 1), images, size.batch, augment=False)
    engine, epoch = ours.trainer(task, size.runs, parallel="auto")
    return epoch, engine.training_memory()


def growth(rows: dict[int, Measured], field: str) -> float:
    """log2 of what the last doubling of the size did to time or memory."""
    before, last = (getattr(row, field) for row in list(rows.values())[-2:])
    return math.log2(last / before)


def lines(name: str, rows: dict[int, Measured]) -> str:
    """The table of one size."""
    cells = [
        [whole(v), padded(1e3 * r.seconds), whole(1 / r.seconds), padded(r.memory / 2**20)]
        for v, r in rows.items()
    ]
    growths = [f"{growth(rows, field):.2f}" for field in Measured._fields]
    cells.append(["growth", growths[0], "", growths[1]])
    return table([NAMES[name], "ms a step", "steps/s", "MiB"], cells)


def figure(found: dict[str, dict[int, Measured]]) -> Any:
    """A panel for each size: time and memory, with a line of growth 1 for each."""
    result = new_figure(8.0, 5.2)
    for axes, (name, rows) in zip(result.subplots(2, 2).flat, found.items(), strict=True):
        sizes = np.array(list(rows))
        for field, color, text in (
            ("seconds", "#0072B2", "ms a step"),
            ("memory", "#D55E00", "MiB"),
        ):
            unit = 1e-3 if field == "seconds" else 2**20
            values = np.array([getattr(row, field) for row in rows.values()]) / unit
            axes.plot(sizes, values, "o-", color=color, markersize=4, label=text)
            axes.plot(sizes, values[-1] * sizes / sizes[-1], ":", color=color, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        tidy(axes, NAMES[name])
        axes.legend(frameon=False)
    result.suptitle("A training step; dotted: linear growth through the last point")
    return result


if __name__ == "__main__":
    flags.main(Config, run)
