"""One run on a GPU: the BatchNorm layer beside a copy, and networks with it.

1. Bandwidth of a copy of a large array, which is read and written.
2. The layer, forward and backward, beside Flax (its fast variance) and torch: time, and the
   share of the copy's bandwidth that its 8 passes over the array come to (aim: 80 %).
3. CIFAR-10's network A in float32 (convolutions in TF32 where the GPU has it): a training step
   and an epoch, data and augmentation on the device.
4. ResNet-50 and BN-Inception: a training step in bfloat16, with our BatchNorm, without and
   with Flax's. BatchNorm's share is what the step takes longer than without (where
   convolutions have biases in its place), over what it takes.
5. `experiments.cifar_speedrun`, in processes of its own: the recipe with 20 seeds, then what
   is changed in it with as many as there is time for. Its milliseconds are of a run, training
   and the last evaluation; its share is the mean test accuracy. All arms with 20 seeds are
   `python -m experiments.cifar_speedrun --dtype=bfloat16`.

Programs are compiled before they are timed. Contestants run in turn in every round; a
measurement is of several calls, which are waited for at its end, and the median over the rounds
counts. What fails says so in its row, and the others go on.

The speedrun has half of the minutes for itself, and what the others leave of theirs. After
their half none of these starts anything more; the speedrun is stopped at the end, and the runs
that it finished count. Rows go to stderr as they come, and with what the speedrun prints; the
table comes at the end.

This process sets no XLA flags, the speedrun's sets those of `bn_jax/training/xla.py`, which are
for CPUs. A process gives back the memory of a GPU only when it ends: there is to be room for
the largest network and, beside it, the speedrun.

CIFAR-10 comes to a machine without a network as what `bn_jax.data` has cached, the folder
`cifar10-...` in `~/.cache/bn_jax` (185 MB; `--cache_dir` names the folder that it is in), or as
records prepared by tensorflow-datasets (53 MB, `--data_dir`), which that package has to decode
there, with array_record. Without either network A trains on random images, and there is no
speedrun.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import layer
from benchmarks.gpu_layers import copies, layers
from benchmarks.gpu_networks import NETWORKS, cifar10, network_a, with_and_without_norm
from benchmarks.gpu_speedrun import speedrun
from benchmarks.gpu_timer import Row, Timer, reason
from benchmarks.where import describe_machine
from bn_jax.errors import UserError
from bn_jax.report import markdown
from bn_jax.report.text import number, padded, percent
from experiments import flags
from experiments.flags import flag


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
    minutes: float = flag(8.0, "the budget")
    speedrun: float = flag(
        0.5, "share of it that experiments.cifar_speedrun has for itself; 0: it is not run"
    )
    data_dir: str | None = flag(None, "of tensorflow-datasets; else TFDS_DATA_DIR")
    cache_dir: str | None = flag(None, "for decoded arrays; by default the user's")

    def __post_init__(self):
        layer.Config(shapes=self.shapes, dtypes=self.dtypes, rounds=self.rounds)
        for name in self.networks:
            if name not in NETWORKS:
                raise UserError(f"--networks: {name!r} is none of {', '.join(NETWORKS)}")
        if self.examples < self.batch:
            raise UserError(f"--examples={self.examples} make no --batch of {self.batch}")
        if not 0 <= self.speedrun <= 1:
            raise UserError(f"--speedrun={self.speedrun}: a share is between 0 and 1")
        if min(self.calls, self.steps) < 1:
            raise UserError("--calls and --steps are at least 1")


def run(config: Config) -> dict[str, Any]:
    """Prints the table, in Markdown; its rows come back.

    `machine` is a text; each of `PARTS` has rows with `seconds` (of one call, or of a run of
    the speedrun) or None, and a `note`, which says why there are none. A part that fails ends
    in a row of its `name` and a `note`.
    """
    # JAX would leave a quarter of the memory to torch, and to the speedrun's process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start = time.monotonic()
    timed = Timer(start + 60 * config.minutes * (1 - config.speedrun), config.rounds)
    result: dict[str, Any] = {"machine": describe_machine("flax", "torch")}
    print(result["machine"])
    if jax.default_backend() != "gpu":
        print("No GPU: what follows is this processor's.")
    lines = []
    for name, part in PARTS.items():
        result[name] = []
        for row in survived(name, part.measure(config, timed, result)):
            lines.append(part.line(row))
            say(f"{time.monotonic() - start:.0f} s: {' | '.join(lines[-1])}")
            result[name].append(row)
    print("\n" + markdown.table(COLUMNS, lines), end="")
    return result


def survived(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, and where they end in an error one of a `name` and a `note` alone."""
    try:
        yield from rows
    except Exception as e:  # whatever it is, the other parts are still to be run
        yield {"name": name, "note": reason(e)}


def say(text: str) -> None:
    """To stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def _copies(config, timed, _):
    yield from copies(config.copies, timed, config.calls)


def _layers(config, timed, result):
    bandwidth = max((row.get("bandwidth") or 0 for row in result["copy"]), default=0)
    for shape in config.shapes:
        for dtype in config.dtypes:
            yield from layers(shape, dtype, bandwidth, timed, config.calls)


def _network_a(config, timed, _):
    split, data = cifar10(config.examples, config.data_dir, config.cache_dir)
    for row in network_a(config.features, config.batch, split, timed, config.calls):
        yield row | {"data": data}


def _networks(config, timed, _):
    for name in config.networks:
        yield from with_and_without_norm(
            name, config.network_batch, config.size, timed, config.steps
        )


def _speedrun(config, timed, _):
    if not config.speedrun:
        return
    given = {"data_dir": config.data_dir, "cache_dir": config.cache_dir}
    paths = [f"--{name}={value}" for name, value in given.items() if value]
    folder = Path("runs", "gpu", time.strftime("%Y%m%d-%H%M%S"))
    end = timed.deadline + 60 * config.minutes * config.speedrun
    yield from speedrun(paths, folder, end)


def known(key: str, form: Callable[[float], str], unit: str) -> Callable[[Row], str]:
    """The row's value as text, "" where there is none."""
    return lambda row: f"{form(row[key])} {unit}" if row[key] is not None else ""


def nothing(_: Row) -> str:
    """In that column."""
    return ""


class Part(NamedTuple):
    """What yields rows, and what the table says of one: what it is, its rate, its share."""

    measure: Callable[[Config, Timer, dict[str, Any]], Iterator[Row]]
    what: Callable[[Row], str]
    rate: Callable[[Row], str] = nothing
    share: Callable[[Row], str] = nothing

    def line(self, row: Row) -> list[str]:
        """The cells of `COLUMNS`."""
        if "name" in row:
            return [row["name"], "", "", "", row["note"]]
        ms = "" if row["seconds"] is None else padded(1e3 * row["seconds"])
        return [self.what(row), ms, self.rate(row), self.share(row), row["note"]]


COLUMNS = ["what", "ms", "rate", "share", "note"]
IMAGES = known("images_per_second", number, "images/s")
PARTS = {
    "copy": Part(
        _copies,
        lambda row: f"copy of {number(row['bytes'] / 2**30)} GiB, float32",
        known("bandwidth", lambda v: number(v / 1e9), "GB/s"),
    ),
    "layer": Part(
        _layers,
        "{0[shape]} {0[dtype]}, {0[task]}: {0[layer]}".format,
        share=known("share", percent, "% of the bandwidth"),
    ),
    "network_a": Part(_network_a, "network A, {0[data]}: {0[what]}".format, IMAGES),
    "networks": Part(
        _networks, "{0[network]}: {0[norm]}".format, IMAGES,
        known("share", percent, "% in BatchNorm"),
    ),
    "speedrun": Part(
        _speedrun, "speedrun: {0[arm]}".format,
        known("epochs", lambda v: f"{v:.1f}", "epochs"),
        known("accuracy", lambda v: f"{100 * v:.2f}", "% right"),
    ),
}  # fmt: skip


if __name__ == "__main__":
    flags.main(Config, run)
