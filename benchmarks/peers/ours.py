"""bn_jax's side: the engines that experiments train with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers.task import CLASSES, Task
from bn_jax.lab.data import Dataset, Split, augmentation, batch_indices
from bn_jax.lab.models import MLP, CifarA
from bn_jax.lab.sweeps import Budget, Point, engines
from bn_jax.lab.training.run import Run, RunState, Swept
from bn_jax.linen import BatchNorm
from bn_jax.xla import set_up

# What an experiment does before it computes.
START = (set_up,)


def prepare(
    task: Task,
    runs: int = 1,
    start: Sequence[Callable[[], Any]] = START,
    parallel: str = "single",
) -> dict[str, Callable[[], Any]]:
    """The programs, and `parameters`; an epoch trains so many runs, together where it pays.

    `start` is called first.
    """
    for call in start:
        call()
    state, step = stepper(task)
    _, epoch = trainer(task, runs, parallel=parallel)
    count = sum(v.size for v in jax.tree.leaves(state.train.params))
    return {"step": step, "epoch": epoch, "parameters": lambda: count}


def stepper(task: Task) -> tuple[RunState, Callable[[], Any]]:
    """A state, and a call that makes the step from there on the first batch."""
    run, train = training(task), data(task).train
    swept, batch = Swept(*jnp.float32([task.learning_rate, 1, 0.9])), jnp.arange(task.batch)
    state = jax.jit(run.init)(jax.random.key(0), swept, train.inputs)
    compiled = jax.jit(run.step)
    return state, lambda: jax.block_until_ready(compiled(state, swept, train, batch))


def trainer(
    task: Task, runs: int = 1, make: type | None = None, parallel: str = "single"
) -> tuple[Any, Callable[[], None]]:
    """An engine, by default that of a sweep, and a call that trains an epoch of its runs."""
    point, budget = Point(task.learning_rate, 1.0, 0.9), Budget(task.steps, task.steps)
    return epochs(training(task), data(task), point, budget, runs, make, parallel)


def epochs(
    run: Run, dataset: Dataset, point: Point, budget: Budget, runs: int, make: type | None,
    parallel: str = "single",
) -> tuple[Any, Callable[[], None]]:  # fmt: skip
    """An engine, and a call that trains its runs for the steps of the budget."""
    seeds = range(runs)
    engine, chunk = engines.prepare(run, dataset, [point], seeds, budget, parallel, make)
    state = [engine.init(chunk)]

    def train():
        for first_step in range(0, budget.steps, budget.eval_every):
            state[0] = jax.block_until_ready(engine.advance(state[0], chunk, first_step))

    return engine, train


def training(task: Task) -> Run:
    """The network with its optimizer."""
    networks = {
        "mlp": functools.partial(MLP, activation="sigmoid"),
        "cifar_a": CifarA,
    }
    optimizers = {"mlp": optax.sgd, "cifar_a": optax.adam}

    def model(swept, **shared):
        norm = functools.partial(BatchNorm, momentum=swept.momentum, **shared)
        return networks[task.network](task.features, CLASSES, norm=norm)

    def batches(key, first_step, steps):
        return batch_indices(key, first_step, steps, task.images, task.batch)

    augment = augmentation(("shift", "flip") if task.augment else ())
    scaled = data(task._replace(images=1)).scaled
    return Run(model, optimizers[task.network], scaled, batches, augment=augment)


def data(task: Task) -> Dataset:
    """The images, as pixels / 255."""
    train = Split(*jax.device_put(task.examples()))
    held_out = Split(train.inputs[:1], train.labels[:1])
    zero, factor = np.float32(0), np.float32(1 / 255)
    return Dataset(train, held_out, held_out, CLASSES, zero, factor)
