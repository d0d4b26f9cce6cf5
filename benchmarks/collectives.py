"""What a training step exchanges, by engine, BatchNorm and number of devices.

All-reduces and their bytes are counted in the compiled program; they are those of any machine.
Examples per second are of fake devices, which share one processor: they show what dividing the
work costs, and what it gains where one device leaves a core idle.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks.where import describe_machine
from bn_jax.data import Split
from bn_jax.linen import BatchNorm, GhostBatchNorm
from bn_jax.measure.timing import interleave
from bn_jax.models import CNN
from bn_jax.report.markdown import table
from bn_jax.report.text import whole
from bn_jax.training.parallel import MODES, batch_mesh, divide, over_devices, replicate
from bn_jax.training.run import Run, Swept
from bn_jax.training.xla import set_flags
from experiments import flags
from experiments.flags import flag

FEATURES = (16, 32, 64)
# By the statistics of a layer; a group of None is of the examples of one device.
NORMS = {"none": None, "whole batch": 0, "a device": None, "two devices": 2}


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.collectives --help`."""

    devices: tuple[int, ...] = flag((1, 2, 4, 8), "numbers of devices")
    batch: int = flag(256, "examples in a step, of 32 x 32 x 3")
    rounds: int = flag(7, "how often each step is timed")


class Case(NamedTuple):
    """A step: how, on how many devices, and which examples share statistics."""

    engine: str
    devices: int
    statistics: str


class Exchanged(NamedTuple):
    """All-reduces of a program, and the bytes that go into them."""

    number: int
    size: int


def exchanged(program: str) -> Exchanged:
    """Counted in the text of a compiled program.

    Raises:
      ValueError: there is another collective than an all-reduce.
    """
    others = re.findall(r" (all-gather|all-to-all|reduce-scatter|collective-permute)", program)
    if others:
        raise ValueError(f"the program has a collective of another kind: {others[0]}")
    found = re.findall(r"= (.*?) all-reduce(?:-start)?\(", program)
    shapes = [s for result in found for s in re.findall(r"[fs]32\[([\d,]*)\]", result)]
    sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    return Exchanged(len(found), 4 * sum(sizes))


def build(case: Case, batch: int) -> Run:
    """A small convolutional network with that norm."""
    share = {"a device": 1, "two devices": 2}.get(case.statistics)

    def network(swept, axis_name=None):
        if case.statistics == "none":
            return CNN(FEATURES)
        if share is None:
            return CNN(FEATURES, norm=functools.partial(BatchNorm, axis_name=axis_name))
        size = share * batch // case.devices
        norm = functools.partial(GhostBatchNorm, group_size=size, axis_name=axis_name)
        return CNN(FEATURES, norm=norm)

    return Run(network, optax.sgd, lambda x: x, batches=None)


def compiled(case: Case, batch: int) -> tuple[Any, Any]:
    """The step, and its arguments where it takes them."""
    mesh, run, rng = batch_mesh(case.devices), build(case, batch), np.random.default_rng(0)
    images = rng.normal(size=(batch, 32, 32, 3)).astype(np.float32)
    data = replicate(Split(images, rng.integers(0, 10, batch).astype(np.int32)), mesh)
    swept = replicate(Swept(*np.float32([0.01, 1, 0.9])), mesh)
    state = replicate(jax.jit(run.init)(jax.random.key(0), swept, data.inputs), mesh)
    rows = divide(np.arange(batch, dtype=np.int32), mesh)

    def step(state, swept, split, rows, axis_name):
        return run.step(state, swept, split, rows, axis_name=axis_name)

    program = over_devices(step, case.engine, mesh, (False, False, False, True))
    args = state, swept, data, rows
    return program.lower(*args).compile(), args


def cases(devices: Sequence[int]) -> list[Case]:
    """All that differ: on one device, and of no statistics, one engine each is enough."""
    found = [Case("jit", 1, "none"), Case("jit", 1, "whole batch")]
    for n in (n for n in devices if n > 1):
        found += [Case(engine, n, "whole batch") for engine in MODES]
        found += [Case("pmap", n, s) for s in ("none", "a device", "two devices")]
    return found


def measure(devices: Sequence[int], batch: int, rounds: int) -> list[tuple]:
    """(case, what it exchanges, examples per second), timed in turn."""
    rows, steps = cases(devices), {}
    counts = {}
    for case in rows:
        step, args = compiled(case, batch)
        counts[case] = exchanged(step.as_text())
        steps[case] = functools.partial(step, *args)
    seconds = interleave(steps, rounds)
    return [(case, counts[case], batch / float(np.median(seconds[case]))) for case in rows]


def run(config: Config) -> None:
    """Prints the table."""
    set_flags()
    jax.config.update("jax_num_cpu_devices", max(config.devices))
    found = measure(config.devices, config.batch, config.rounds)
    print(describe_machine() + "\n")
    rows = []
    for case, sent, speed in found:
        several = case.devices > 1
        exchange = [whole(sent.number), f"{sent.size / 1e3:,.1f}"] if several else ["-", "-"]
        rows.append([str(case.devices), case.engine, case.statistics, *exchange, whole(speed)])
    header = "devices", "engine", "share statistics", "all-reduces", "kB in them", "examples/s"
    print(table([*header], rows))


if __name__ == "__main__":
    flags.main(Config, run)
