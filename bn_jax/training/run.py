"""A run as pure functions of its key and of the numbers that are swept.

`init`, then `step` on one batch of example numbers after the other, and `evaluate` where
it is wanted. All three can be jitted, and vmapped over keys and swept numbers: that is
what `bn_jax.measure.sweep` does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bn_jax.training.state import TrainState
from bn_jax.training.step import Metrics, evaluate_chunk, init_state, unguarded_step


class Swept(NamedTuple):
    """What a sweep varies besides the key, float32 `[]` each.

    Attributes:
      learning_rate: of the optimizer.
      init_scale: factor on every kernel at the start.
      momentum: of BatchNorm's running statistics; no part of a model without them.
    """

    learning_rate: jax.Array
    init_scale: jax.Array
    momentum: jax.Array


class RunState(NamedTuple):
    """The training state, the sum of training losses, and the step that diverged.

    `loss_sum` grows until somebody sets it to 0. `diverged_at` is -1, or the number of the
    first step whose loss was not finite.
    """

    train: TrainState
    loss_sum: jax.Array
    diverged_at: jax.Array


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes:
      model: the network for the swept numbers.
      optimizer: the transformation for a learning rate.
      scaled: from stored inputs to the network's.
      batches: (key, first step, number of steps) to the examples of each of those steps,
        int32 `[steps, batch]`.
    """

    model: Callable[[Swept], nn.Module]
    optimizer: Callable[[jax.Array], optax.GradientTransformation]
    scaled: Callable[[jax.Array], jax.Array]
    batches: Callable[[jax.Array, jax.Array, int], jax.Array]

    def init(self, key: jax.Array, swept: Swept, inputs: jax.Array) -> RunState:
        """The state before the first step; of inputs `[n, ...]` only the shape matters."""
        key = jax.random.fold_in(key, 0)
        tx = self.optimizer(swept.learning_rate)
        model, example = self.model(swept), self.scaled(inputs[:1])
        state = init_state(key, model, tx, example, swept.init_scale)
        return RunState(state, jnp.float32(0), jnp.int32(-1))

    def step(self, state: RunState, swept: Swept, split: Any, rows: jax.Array) -> RunState:
        """One step on the examples `rows` (int32 `[batch]`) of the split.

        A run that has diverged stops: its training state stays as it was before the first
        step whose loss was not finite.
        """
        inputs, labels = self.scaled(split.inputs[rows]), split.labels[rows]
        tx = self.optimizer(swept.learning_rate)
        model = self.model(swept)
        train, loss, _ = unguarded_step(state.train, inputs, labels, model, tx)
        first = ~jnp.isfinite(loss) & (state.diverged_at < 0)
        diverged_at = jnp.where(first, state.train.step, state.diverged_at)
        train = jax.tree.map(functools.partial(jnp.where, diverged_at < 0), train, state.train)
        return RunState(train, state.loss_sum + loss, diverged_at)

    def evaluate(self, state: RunState, swept: Swept, split: Any, rows: jax.Array) -> Metrics:
        """Sums over the examples `rows` (int32 `[n]`) of a split; those past its end are 0."""
        end = split.labels.shape[0]
        picked = jnp.minimum(rows, end - 1)
        inputs, labels = self.scaled(split.inputs[picked]), split.labels[picked]
        return evaluate_chunk(state.train, self.model(swept), inputs, labels, rows < end)


def data_key(key: jax.Array) -> jax.Array:
    """The key that a run shuffles its data with."""
    return jax.random.fold_in(key, 1)
