"""bn_jax's side: the engines that experiments train with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers import CLASSES, Task
from bn_jax.lab.data import Dataset, Split, augmentation, batch_indices
from bn_jax.lab.models import MLP, CifarA
from bn_jax.lab.sweeps import Budget, Point, engines
from bn_jax.lab.training.run import Run, Swept
from bn_jax.linen import BatchNorm
from bn_jax.xla import set_up

# What an experiment does before it computes.
START = (set_up,)


def prepare(
    task: Task, runs: int = 1, start: Sequence[Callable[[], Any]] = START,
    parallel: str = "single",
) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """The programs; an epoch trains so many runs. `start` is called first."""
    for call in start:
        call()
    run, train = training(task), data(task).train
    swept, batch = Swept(*jnp.float32([task.learning_rate, 1, 0.9])), jnp.arange(task.batch)
    state = jax.jit(run.init)(jax.random.key(0), swept, train.inputs)
    compiled = jax.jit(run.step)
    count = sum(v.size for v in jax.tree.leaves(state.train.params))
    return {
        "step": lambda: jax.block_until_ready(compiled(state, swept, train, batch)),
        "epoch": trainer(task, runs, parallel=parallel),
        "parameters": lambda: count,
    }


def trainer(
    task: Task, runs: int = 1, make: type | None = None, parallel: str = "single"
) -> Callable[[], None]:
    """A call that trains an epoch of the runs, by the engine of a sweep or by another."""
    point, budget = Point(task.learning_rate, 1.0, 0.9), Budget(task.steps, task.steps)
    return epochs(training(task), data(task), point, budget, runs, make, parallel)


def epochs(
    run: Run, dataset: Dataset, point: Point, budget: Budget, runs: int, make: type | None,
    parallel: str = "single",
) -> Callable[[], None]:  # fmt: skip
    """A call that trains the runs for the steps of the budget."""
    engine, chunk = engines.prepare(run, dataset, [point], range(runs), budget, parallel, make)
    state = [engine.init(chunk)]

    def train():
        for first_step in range(0, budget.steps, budget.eval_every):
            state[0] = jax.block_until_ready(engine.advance(state[0], chunk, first_step))

    return train


def training(task: Task) -> Run:
    """The network with its optimizer."""
    network = functools.partial(MLP, activation="sigmoid") if task.sgd else CifarA

    def model(swept, **shared):
        norm = functools.partial(BatchNorm, momentum=swept.momentum, **shared)
        return network(task.features, CLASSES, norm=norm)

    def batches(key, first_step, steps):
        return batch_indices(key, first_step, steps, task.images, task.batch)

    augment = augmentation(("shift", "flip") if task.augment else ())
    scaled = data(task._replace(images=1)).scaled
    return Run(model, optax.sgd if task.sgd else optax.adam, scaled, batches, augment=augment)


def data(task: Task) -> Dataset:
    """The images, as pixels / 255."""
    train = Split(*jax.device_put(task.examples()))
    held_out = Split(train.inputs[:1], train.labels[:1])
    zero, factor = np.float32(0), np.float32(1 / 255)
    return Dataset(train, held_out, held_out, CLASSES, zero, factor)
