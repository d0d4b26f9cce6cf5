"""Times and bytes of one BatchNorm layer, beside Flax, torch and a plain copy of the array.

Four tasks, on arrays of several shapes and dtypes and with parameters in float32: forward
(y and the new running statistics), forward+backward (and the gradients of x, scale and bias),
the same of relu(BatchNorm(x)), which in bn_jax is one function, and the same with a mask that
leaves out every fourth place, which torch does not know.

All run in one process, each once in every round; what counts is the median over the rounds,
of times and of ratios within a round. `/flax` is the time over that of Flax's BatchNorm
with its fast variance. `/floor` is the time over what the task's passes over the array
would take at the speed of the copy, which makes 2: 3 forward, 5 backward. In units of the
array: `allocated` is temporary and output memory of the compiled program, `kept` what
reverse mode keeps of the forward pass beside its arguments.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import NamedTuple

import jax

from benchmarks.contestants import BOTH, BOTH_WITH_RELU, TASKS, prepare
from benchmarks.machine import describe_machine, one_heap
from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.report import markdown
from bn_jax.lab.report.text import padded
from bn_jax.lab.sweeps.timing import interleave, median_ratio

OURS, BASELINE = "bn_jax", "flax fast"
DTYPES = ("float32", "bfloat16", "float16")
KEPT = "large blocks are kept for the next call (mallopt): no page faults are timed"
# The shares of Flax's time to stay below at the largest shape; elsewhere it is 1.
TARGETS = {BOTH.name: 0.6, BOTH_WITH_RELU.name: 0.4}


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.layer --help`."""

    shapes: tuple[str, ...] = flag(
        ("256x32x32x32", "256x8x8x128", "4096x512"), "of the arrays, features last"
    )
    dtypes: tuple[str, ...] = flag(("float32", "bfloat16"), f"of {', '.join(DTYPES)}")
    rounds: int = flag(100, "how often everything is timed")

    def __post_init__(self):
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise UserError(f"--dtypes: {dtype!r} is none of {', '.join(DTYPES)}")


class Row(NamedTuple):
    """A contestant at a task: medians, and bytes where they are known."""

    array: str
    task: str
    name: str
    seconds: float
    to_flax: float
    to_floor: float
    allocated: int | None
    kept: int | None


def run(config: Config) -> list[Row]:
    """Prints a table for each array and the verdict; the rows come back."""
    memory = KEPT if one_heap() else "as the allocator has it: page faults may be timed"
    print(f"- machine: {describe_machine('flax', 'torch')}\n- memory: {memory}")
    rows, arrays = [], [(shape, dtype) for shape in config.shapes for dtype in config.dtypes]
    for shape, dtype in arrays:
        keys = jax.random.split(jax.random.key(0))
        x, dy = (jax.random.normal(key, sizes(shape)).astype(dtype) for key in keys)
        new = measure(f"{shape} {dtype}", x, dy, config.rounds)
        print(f"\n**{shape} {dtype}, {x.nbytes:,} bytes**\n\n{table(new, x.nbytes)}")
        rows += new
    print(verdict(rows, max(config.shapes, key=lambda shape: math.prod(sizes(shape)))))
    return rows


def measure(array: str, x: jax.Array, dy: jax.Array, rounds: int) -> list[Row]:
    """The rows of all tasks on one array."""
    rows = []
    for task in TASKS:
        entered = prepare(task, x, dy)
        seconds = interleave({name: c.call for name, c in entered.items()}, rounds)
        for name, c in entered.items():
            to_flax = median_ratio(seconds, name, BASELINE)
            to_floor = median_ratio(seconds, name, "copy") * 2 / task.passes
            median = statistics.median(seconds[name])
            rows.append(
                Row(array, task.name, name, median, to_flax, to_floor, c.allocated, c.kept)
            )
    return rows


def sizes(shape: str) -> tuple[int, ...]:
    """ "256x8x8x128" as numbers."""
    found = shape.split("x")
    if len(found) < 2 or not all(n.isdecimal() and int(n) for n in found):
        raise UserError(f"--shapes: {shape!r} is no shape such as 256x8x8x128")
    return tuple(map(int, found))


def table(rows: list[Row], size: int) -> str:
    """A line for each task and contestant, of an array of so many bytes."""
    lines = []
    for row in rows:
        first = row.name == "copy"
        ratios = f"{row.to_flax:.2f}", "" if first else f"{row.to_floor:.2f}"
        memory = ("" if v is None else f"{v / size:.2f}" for v in (row.allocated, row.kept))
        start = row.task if first else "", row.name, padded(1e3 * row.seconds)
        lines.append([*start, *ratios, *memory])
    header = ["task", "", "ms", "/flax", "/floor", "allocated", "kept"]
    return markdown.table(header, lines)


def verdict(rows: list[Row], largest: str) -> str:
    """bn_jax's shares of others' time and memory, beside those of the floor and the targets."""
    ours = [row for row in rows if row.name == OURS]
    found = {(row.array, row.task, row.name): row for row in rows}

    def at_most(unit, share, target=1):
        shares = [(share(row, found.get((row.array, row.task, unit))), row) for row in ours]
        most, row = max(shares, key=lambda pair: pair[0])
        what = f"({row.task}, {row.array}; target {target})"
        return f"at most {most:.2f} of {{}} {what}" if most else None

    of_time = at_most("torch", lambda row, other: row.to_flax / other.to_flax if other else 0)
    of_memory = at_most(BASELINE, lambda row, other: row.allocated / other.allocated)
    said = {
        "Flax's time": at_most("", lambda row, _: row.to_flax),
        "torch's time": of_time,
        "the floor": at_most("", lambda row, _: row.to_floor, 2),
        "Flax's memory": of_memory,
    }
    lines = [line.format(unit) for unit, line in said.items() if line]
    for task, target in TARGETS.items():
        shares = [
            f"{r.to_flax:.2f} in {r.array.split()[1]} (the floor {r.to_flax / r.to_floor:.2f})"
            for r in ours
            if (r.array.split()[0], r.task) == (largest, task)
        ]
        lines.append(f"of Flax's time {', '.join(shares)} ({task}, {largest}; target {target})")
    return "\n- ".join(["bn_jax takes", *lines])


if __name__ == "__main__":
    flags.main(Config, run)
