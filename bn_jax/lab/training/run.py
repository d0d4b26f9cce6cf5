"""A run as pure functions of its key and of the numbers that are swept.

`init`, then `step` on one batch of example numbers after the other, and `evaluate` where
it is wanted. All three can be jitted, and vmapped over keys and swept numbers: that is
what `bn_jax.lab.sweeps.sweep` does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bn_jax.lab.data.dataset import Dataset
from bn_jax.lab.statistics.records import Budget
from bn_jax.lab.training.metrics import correct, cross_entropy
from bn_jax.lab.training.state import TrainState
from bn_jax.lab.training.step import (
    Loss,
    Metric,
    Metrics,
    evaluate_chunk,
    init_state,
    unguarded_step,
)

# What the keys derived from a run's key are for.
INIT, DATA, NOISE = range(3)
# NumPy's, as JAX is not to start on import.
NO_SUMS = Metrics(*np.zeros(2, np.float32))  # type: ignore[reportArgumentType]


class Swept(NamedTuple):
    """What a sweep varies besides the key, float32 `[]` each.

    Where only the model is wanted, of trained weights or for its shapes, `Swept()` will do.

    Attributes:
      learning_rate: of the optimizer.
      init_scale: factor on every kernel at the start.
      momentum: of BatchNorm's running statistics; no part of a model without them.
    """

    learning_rate: jax.Array | float = 1.0
    init_scale: jax.Array | float = 1.0
    momentum: jax.Array | float = 0.9


class RunState(NamedTuple):
    """The training state, sums over the steps, and the step that diverged.

    `sums` of the batches' mean loss and accuracy grow until somebody sets them to 0.
    `diverged_at` is -1, or the number of the first step whose loss was not finite. `key` is
    of dropout and augmentation.
    """

    train: TrainState
    sums: Metrics
    diverged_at: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes:
      model: the network for the swept numbers; given `axis_name` as well, one whose norms
        share their statistics over it.
      optimizer: the transformation for a learning rate.
      scaled: from stored inputs to the network's.
      batches: (key, first step, number of steps) to the examples of each of those steps,
        int32 `[steps, batch]`.
      loss: (outputs, labels) to the loss of every example in training.
      tested: the same in evaluation: without label smoothing.
      metric: (outputs, labels) to what is better if higher, of every example.
      augment: (key, inputs of the network) to others, in training; or None.
    """

    model: Callable[..., nn.Module]
    optimizer: Callable[[jax.Array | float], optax.GradientTransformation]
    scaled: Callable[[jax.Array], jax.Array]
    batches: Callable[[jax.Array, jax.Array, int], jax.Array]
    loss: Loss = cross_entropy
    tested: Loss = cross_entropy
    metric: Metric = correct
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    def init(self, key: jax.Array, swept: Swept, inputs: jax.Array) -> RunState:
        """The state before the first step; of inputs `[n, ...]` only the shape matters."""
        tx = self.optimizer(swept.learning_rate)
        model, example = self.model(swept), self.scaled(inputs[:1])
        state = init_state(_key(key, INIT), model, tx, example, swept.init_scale)
        return RunState(state, NO_SUMS, jnp.int32(-1), _key(key, NOISE))

    def step(
        self,
        state: RunState,
        swept: Swept,
        split: Any,
        rows: jax.Array,
        *,
        filled: bool = False,
        axis_name: str | None = None,
    ) -> RunState:
        """One step on the examples `rows` (int32 `[batch]`) of the split.

        If the batch is filled up, rows past the end of the split do not count. Over a mapped
        axis `rows` are a device's part of the batch, and the state is the same on all;
        noise (dropout, augmentation) is then other than without, of the same distribution.

        A run that has diverged stops: its training state stays as it was before the first
        step whose loss was not finite.
        """
        inputs, labels, counted = self._examples(split, rows)
        noise, dropout = jax.random.split(jax.random.fold_in(state.key, state.train.step))
        shared = {}
        if axis_name is not None:
            noise, dropout = (
                jax.random.fold_in(k, lax.axis_index(axis_name)) for k in (noise, dropout)
            )
            shared = {"axis_name": axis_name}
        if self.augment is not None:
            inputs = self.augment(noise, inputs)
        train, means, _ = unguarded_step(
            state.train, inputs, labels, self.model(swept, **shared),
            self.optimizer(swept.learning_rate), loss=self.loss, metric=self.metric,
            key=dropout,
            counted=counted if filled else None, **shared,
        )  # fmt: skip
        first = ~jnp.isfinite(means.loss) & (state.diverged_at < 0)
        diverged_at = jnp.where(first, state.train.step, state.diverged_at)
        train = jax.tree.map(functools.partial(jnp.where, diverged_at < 0), train, state.train)
        sums = jax.tree.map(lambda s, mean: s + mean.astype(s.dtype), state.sums, means)
        return RunState(train, sums, diverged_at, state.key)

    def evaluate(
        self,
        state: RunState,
        swept: Swept,
        split: Any,
        rows: jax.Array,
        *,
        axis_name: str | None = None,
    ) -> Metrics:
        """Sums over the examples `rows` (int32 `[n]`) of a split; those past its end are 0."""
        examples = self._examples(split, rows)
        sums = evaluate_chunk(
            state.train, self.model(swept), *examples, loss=self.tested, metric=self.metric
        )
        return sums if axis_name is None else lax.psum(sums, axis_name)

    def _examples(self, split, rows):
        end = split.labels.shape[0]
        picked = jnp.minimum(rows, end - 1)
        return self.scaled(split.inputs[picked]), split.labels[picked], rows < end


class Curve(NamedTuple):
    """What a run measured, at the evaluations.

    Attributes:
      steps: int32 `[evaluations]`, from 0.
      train: means over the steps since the evaluation before; 0 before the first step.
      validation, test: means over the examples, with running statistics.
      diverged_at: the first step whose loss was not finite, int32 `[]`, or -1.
    """

    steps: jax.Array
    train: Metrics
    validation: Metrics
    test: Metrics
    diverged_at: jax.Array


def train(run: Run, key: jax.Array, swept: Swept, dataset: Dataset, budget: Budget) -> Curve:
    """A whole run as one pure function: a scan over evaluations, in each a scan over steps.

    It is what the faster ways to train a grid (`bn_jax.lab.sweeps`) are tested against, and
    what `jax.vmap` takes: `jax.vmap(train, (None, 0, None, None, None))(run, keys, ...)`.

    Args:
      run: what is trained.
      key: of initial weights, data order, dropout and augmentation.
      swept: learning rate, initial scale, momentum.
      dataset: with splits `train`, `validation` and `test`.
      budget: its `steps` and `eval_every`; a run does not stop early here.
    """
    budget.check()

    def held_out(state, split):
        examples = split.labels.shape[0]
        sums = run.evaluate(state, swept, split, jnp.arange(examples))
        return jax.tree.map(lambda v: v / examples, sums)

    def measured(state):
        means = jax.tree.map(lambda v: jnp.asarray(v) / budget.eval_every, state.sums)
        splits = dataset.validation, dataset.test
        return (state.train.step, means, *(held_out(state, split) for split in splits))

    def step(state, rows):
        return run.step(state, swept, dataset.train, rows), None

    def to_the_next(state, first):
        order = run.batches(data_key(key), first, budget.eval_every)
        zeros = jax.tree.map(jnp.asarray, NO_SUMS)
        state, _ = lax.scan(step, state._replace(sums=zeros), order)
        return state, measured(state)

    start = run.init(key, swept, dataset.train.inputs)
    firsts = jnp.arange(0, budget.steps, budget.eval_every)
    state, later = lax.scan(to_the_next, start, firsts)
    steps, *rest = jax.tree.map(jnp.append, measured(start), later)
    return Curve(steps, *rest, diverged_at=state.diverged_at)


def data_key(key: jax.Array) -> jax.Array:
    """The key that a run shuffles its data with."""
    return _key(key, DATA)


def _key(key, purpose):
    return jax.random.fold_in(key, purpose)
