"""One run on a GPU: the BatchNorm layer beside a copy, and networks with it.

1. Bandwidth of a copy of a large array, which is read and written.
2. The layer, forward and backward, beside Flax (its fast variance), and torch where it has
   CUDA: time, and the share of the copy's bandwidth that its 8 passes over the array come to.
3. CIFAR-10's network A: a training step and an epoch, data and augmentation on the device.
4. ResNet-50 and BN-Inception: a training step in bfloat16, with our BatchNorm, with Flax's
   and without.
5. `experiments.cifar_speedrun`, in a process of its own.

Everything is compiled first. Contestants run in turn in every round; a measurement is of
several calls, which are waited for at its end, and the median over the rounds counts. What
fails says so in its row, and the others go on. What would start after the budget is spent is
skipped. No XLA flags are set.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

from benchmarks import layer
from benchmarks.gpu_layers import copies, layers
from benchmarks.gpu_networks import NETWORKS, cifar10, network_a, with_and_without_norm
from benchmarks.gpu_timer import SKIPPED, Row, Timer, reason
from benchmarks.where import describe_machine
from bn_jax.errors import UserError
from bn_jax.report import markdown
from bn_jax.report.text import number, padded, percent
from experiments import flags
from experiments.flags import flag

SPEEDRUN = (
    "-m", "experiments.cifar_speedrun", "--arms=bn", "--seeds=20", "--dtype=bfloat16"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.gpu --help`."""

    copies: tuple[float, ...] = flag((1, 4), "GiB of the arrays that are copied")
    shapes: tuple[str, ...] = flag(
        ("256x112x112x64", "256x56x56x256", "256x14x14x1024"), "of the layer's arrays"
    )
    dtypes: tuple[str, ...] = flag(("bfloat16", "float32"), f"of {', '.join(layer.DTYPES)}")
    features: tuple[int, ...] = flag((32, 64, 128, 512, 128), "of network A")
    batch: int = flag(256, "images in a step of network A")
    examples: int = flag(50_000, "images in its epoch")
    networks: tuple[str, ...] = flag(tuple(NETWORKS), f"of {', '.join(NETWORKS)}")
    network_batch: int = flag(256, "images in a step of these")
    size: int = flag(224, "height and width of their images")
    calls: int = flag(20, "calls in a measurement of a copy, a layer or a step of network A")
    steps: int = flag(5, "steps in a measurement of the other networks")
    rounds: int = flag(7, "how often everything is timed")
    minutes: float = flag(8.0, "the budget, after which nothing more is started")
    speedrun: bool = flag(True, "run experiments.cifar_speedrun at the end")
    data_dir: str | None = flag(None, "of tensorflow-datasets; else TFDS_DATA_DIR")
    cache_dir: str | None = flag(None, "for decoded arrays; by default the user's")

    def __post_init__(self):
        layer.Config(shapes=self.shapes, dtypes=self.dtypes, rounds=self.rounds)
        for name in self.networks:
            if name not in NETWORKS:
                raise UserError(f"--networks: {name!r} is none of {', '.join(NETWORKS)}")
        if self.examples < self.batch:
            raise UserError(f"--examples={self.examples} make no --batch of {self.batch}")
        if min(self.calls, self.steps) < 1:
            raise UserError("--calls and --steps are at least 1")


def run(config: Config) -> dict[str, Any]:
    """Prints the tables, in Markdown; their rows come back.

    `machine` is a text; each of `PARTS` has rows with `seconds` (of one call), or a `note`
    that says why there are none; `speedrun` is such a note.
    """
    # JAX would leave a quarter of the memory to torch, and to the speedrun's process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    timed = Timer(time.monotonic() + 60 * config.minutes, config.rounds)
    result: dict[str, Any] = {"machine": describe_machine("flax", "torch")}
    print(result["machine"])
    for name, part in PARTS.items():
        print(f"\n{part.title.format(**vars(config))}", flush=True)
        result[name] = list(shown(part, part.measure(config, timed, result)))
    if config.speedrun:
        result["speedrun"] = SKIPPED if timed.spent() else speedrun(config)
        print(f"\nThe speedrun: {result['speedrun']}.")
    return result


def shown(part: Part, groups: Iterator[list[Row]]) -> Iterator[Row]:
    """The rows, of which a table is printed for each group as soon as it is there."""
    try:
        for rows in groups:
            lines = [[text(row) for text in part.columns.values()] for row in rows]
            print("\n" + markdown.table(list(part.columns), lines), end="", flush=True)
            yield from rows
    except Exception as e:  # whatever it is, the other parts are still to be run
        print(f"\n{reason(e)}")


def speedrun(config: Config) -> str:
    """Runs it, printing what it prints; how it ended."""
    given = {"data_dir": config.data_dir, "cache_dir": config.cache_dir}
    command = [*SPEEDRUN, *(f"--{name}={v}" for name, v in given.items() if v)]
    print(f"\n```\npython {shlex.join(command)}\n", flush=True)
    status = subprocess.run([sys.executable, *command]).returncode
    print("```")
    return f"ended with status {status}" if status else "done"


def _copies(config, timed, _):
    yield copies(config.copies, timed, config.calls)


def _layers(config, timed, result):
    bandwidth = max((row["bandwidth"] or 0 for row in result["copy"]), default=0)
    for shape in config.shapes:
        for dtype in config.dtypes:
            yield layers(shape, dtype, bandwidth, timed, config.calls)


def _network_a(config, timed, _):
    split, data = cifar10(config.examples, config.data_dir, config.cache_dir)
    rows = network_a(config.features, config.batch, split, timed, config.calls)
    yield [row | {"data": data} for row in rows]


def _networks(config, timed, _):
    for name in config.networks:
        yield with_and_without_norm(
            name, config.network_batch, config.size, timed, config.steps
        )


def _if_known(key, form):
    return lambda row: form(row[key]) if row[key] else ""


class Part(NamedTuple):
    """A title, the columns of its tables as text of a row, and what yields their rows."""

    title: str
    columns: dict[str, Callable[[Row], str]]
    measure: Callable[[Config, Timer, dict[str, Any]], Iterator[list[Row]]]


MS = {"ms": lambda row: row["note"] or padded(1e3 * row["seconds"])}
IMAGES = {"images/s": _if_known("images_per_second", number)}
PARTS = {
    "copy": Part(
        "A copy of float32:",
        {
            "GiB": lambda row: number(row["bytes"] / 2**30),
            **MS,
            "GB/s, read and written": _if_known("bandwidth", lambda v: number(v / 1e9)),
        },
        _copies,
    ),
    "layer": Part(
        "BatchNorm; 8 passes over the array as a share of the copy's bandwidth (aim: 80 %):",
        {
            **{name: itemgetter(name) for name in ("shape", "dtype", "task", "layer")},
            **MS,
            "% of the bandwidth": _if_known("share", percent),
        },
        _layers,
    ),
    "network_a": Part(
        "CIFAR-10's network A in batches of {batch}, float32 (convolutions in TF32 where the "
        "GPU has it), with input and augmentation on the device:",
        {"network A": itemgetter("what"), "images": itemgetter("data"), **MS, **IMAGES},
        _network_a,
    ),
    "networks": Part(
        "Training steps in bfloat16 on {network_batch} images of {size} x {size}; the share "
        "of BatchNorm is what the step takes longer than without (where convolutions have "
        "biases in its place), over what it takes:",
        {
            "network": itemgetter("network"),
            "norm": itemgetter("norm"),
            **MS,
            **IMAGES,
            "% of the time in BatchNorm": _if_known("share", percent),
        },
        _networks,
    ),
}


if __name__ == "__main__":
    flags.main(Config, run)
