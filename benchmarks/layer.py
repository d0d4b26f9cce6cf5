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
import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax

from benchmarks import contestants
from benchmarks.contestants import BOTH, BOTH_WITH_RELU, TASKS
from benchmarks.memory import one_heap
from benchmarks.where import describe_machine
from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.report import markdown
from bn_jax.lab.report.text import padded
from bn_jax.lab.sweeps.timing import interleave, median_ratio

OURS, BASELINE = "bn_jax", "flax fast"
DTYPES = ("float32", "bfloat16", "float16")
QUICK = 5  # rounds
KEPT = "large blocks are kept for the next call (mallopt): no page faults are timed"
# The shares of Flax's time to stay below at the largest shape; elsewhere it is 1.
TARGETS = {BOTH.name: 0.6, BOTH_WITH_RELU.name: 0.4}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every flag of the benchmark; see `python -m benchmarks.layer --help`."""

    shapes: tuple[str, ...] = flag(
        ("256x32x32x32", "256x8x8x128", "4096x512"), "of the arrays, features last"
    )
    dtypes: tuple[str, ...] = flag(("float32", "bfloat16"), f"of {', '.join(DTYPES)}")
    rounds: int = flag(100, "how often everything is timed")
    quick: bool = flag(False, f"{QUICK} rounds")
    page_faults: bool = flag(
        False, "leave the allocator as it is, which maps large arrays anew at every call"
    )
    workdir: str | None = flag(None, "folder for layer.json; by default there is none")

    def __post_init__(self):
        for shape in self.shapes:
            sizes = shape.split("x")
            if len(sizes) < 2 or not all(n.isdecimal() and int(n) for n in sizes):
                raise UserError(f"--shapes: {shape!r} is no shape such as 256x8x8x128")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise UserError(f"--dtypes: {dtype!r} is none of {', '.join(DTYPES)}")
        if not self.shapes or not self.dtypes or self.rounds < 1:
            raise UserError("name a shape and a dtype at least, and --rounds of at least 1")


def run(config: Config) -> dict[str, Any]:
    """Prints a table for each array and the verdict; what `layer.json` holds comes back.

    Its `rows` have `shape`, `dtype`, `array_bytes`, `task`, `contestant`, the medians
    `seconds`, `to_flax` and `to_floor`, and `allocated` and `kept` in bytes, or None.
    """
    keeps = not config.page_faults and one_heap()
    memory = KEPT if keeps else "as the allocator has it: page faults may be timed"
    settings = {"machine": describe_machine("flax", "torch"), "memory": memory}
    for name, value in settings.items():
        print(f"- {name}: {value}")
    rows = []
    for shape in config.shapes:
        for dtype in config.dtypes:
            new = measure(shape, dtype, QUICK if config.quick else config.rounds)
            print("\n**{shape} {dtype}, {array_bytes:,} bytes**\n".format(**new[0]))
            print(table(new))
            rows += new
    print("\n".join(verdict(rows)))
    result = {**settings, "flags": dataclasses.asdict(config), "rows": rows}
    if config.workdir:
        folder = Path(config.workdir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "layer.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def measure(shape: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of all tasks on one array."""
    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.random.normal(key, sizes(shape)).astype(dtype) for key in keys)
    array = {"shape": shape, "dtype": dtype, "array_bytes": x.nbytes}
    rows = []
    for task in TASKS:
        entered = contestants.prepare(task, x, dy)
        seconds = interleave({name: c.call for name, c in entered.items()}, rounds)
        rows += [
            {
                **array,
                "task": task.name,
                "contestant": name,
                "seconds": statistics.median(seconds[name]),
                "to_flax": median_ratio(seconds, name, BASELINE),
                "to_floor": median_ratio(seconds, name, "copy") * 2 / task.passes,
                "allocated": contestant.allocated,
                "kept": contestant.kept,
            }
            for name, contestant in entered.items()
        ]
    return rows


def sizes(shape: str) -> tuple[int, ...]:
    """ "256x8x8x128" as numbers."""
    return tuple(map(int, shape.split("x")))


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each task and contestant, of one array."""
    lines = []
    for row in rows:
        first = row["contestant"] == "copy"
        in_arrays = (row[k] and row[k] / row["array_bytes"] for k in ("allocated", "kept"))
        lines.append([
            row["task"] if first else "",
            row["contestant"],
            padded(1e3 * row["seconds"]),
            f"{row['to_flax']:.2f}",
            "" if first else f"{row['to_floor']:.2f}",
            *("" if v is None else f"{v:.2f}" for v in in_arrays),
        ])  # fmt: skip
    header = ["task", "", "ms", "/flax", "/floor", "allocated", "kept"]
    return markdown.table(header, lines)


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """bn_jax's shares of others' time and memory, beside those of the floor and the targets."""
    ours = [row for row in rows if row["contestant"] == OURS]

    def at_most(unit, share, target):
        found = [(share(row), row) for row in ours if share(row)]
        if not found:
            return []
        most, row = max(found, key=lambda pair: pair[0])
        where = "{task}, {shape} {dtype}".format(**row)
        return [f"- at most {most:.2f} of {unit} ({where}; target {target})"]

    lines = [
        "bn_jax takes",
        *at_most("Flax's time", lambda row: row["to_flax"], 1),
        *at_most("torch's time", lambda row: beside(rows, row, "torch", "to_flax"), 1),
        *at_most("the floor", lambda row: row["to_floor"], 2),
        *at_most("Flax's memory", lambda row: beside(rows, row, BASELINE, "allocated"), 1),
    ]
    largest = max((row["shape"] for row in ours), key=lambda s: math.prod(sizes(s)))
    for task, target in TARGETS.items():
        shares = [
            "{to_flax:.2f} in {dtype} (the floor {floor:.2f})".format(
                **row, floor=row["to_flax"] / row["to_floor"]
            )
            for row in ours
            if (row["shape"], row["task"]) == (largest, task)
        ]
        about = f"{task}, {largest}; target {target}"
        lines.append(f"- of Flax's time {', '.join(shares)} ({about})")
    return lines


def beside(rows: list[dict[str, Any]], row: dict[str, Any], name: str, what: str) -> float:
    """A row's number over that of a contestant at the same task, 0 where there is none."""
    same = ("shape", "dtype", "task")
    for other in rows:
        alike = all(other[key] == row[key] for key in same)
        if alike and other["contestant"] == name and other[what]:
            return row[what] / other[what]
    return 0.0


if __name__ == "__main__":
    flags.main(Config, run)
