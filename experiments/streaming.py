"""One network, trained on batches that come one by one, on one device or on all."""

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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax.data.imagenet import Batch
from bn_jax.measure.layouts import Single
from bn_jax.training.metrics import correct, cross_entropy, in_top
from bn_jax.training.parallel import AXIS, batch_mesh
from bn_jax.training.state import TrainState
from bn_jax.training.step import init_state, train_step
from bn_jax.training.xla import run_once

# Of ImageNet's training images in [0, 1], red, green and blue.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
# So many skipped steps in a row, and a run has diverged.
IN_A_ROW = 20


class Sums(NamedTuple):
    """Over training steps that were not skipped: of a batch's mean loss and accuracy, 1."""

    loss: jax.Array
    accuracy: jax.Array
    steps: jax.Array


class Counts(NamedTuple):
    """Over evaluated examples: loss in nats, right answers, among the first 5, 1."""

    loss: jax.Array
    accuracy: jax.Array
    top5_accuracy: jax.Array
    examples: jax.Array


class State(NamedTuple):
    """The training state, sums since somebody set them to 0, and what is said of divergence.

    `skipped` of the last steps in a row were skipped. `diverged_at` is -1, or the number of
    the first of the `IN_A_ROW` with which the run ended.
    """

    train: TrainState
    sums: Sums
    skipped: jax.Array
    diverged_at: jax.Array


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained, and how.

    Attributes:
      model: the network, whose norms share statistics over the axis, if one is given.
      optimizer: with its learning rate.
      label_smoothing: in training.
    """

    model: Callable[[str | None], nn.Module]
    optimizer: optax.GradientTransformation
    label_smoothing: float = 0.0

    def init(self, seed: jax.Array, images: jax.Array) -> State:
        """The state before the first step; of the images only the shape matters."""
        key, example = jax.random.key(seed), standardised(images[:1])
        train = init_state(key, self.model(None), self.optimizer, example)
        return State(train, _zero(Sums), jnp.int32(0), jnp.int32(-1))

    def step(
        self,
        state: State,
        images: jax.Array,
        labels: jax.Array,
        counted: jax.Array,
        *,
        axis_name: str | None = None,
    ) -> tuple[State, jax.Array]:
        """The next state, and the mean loss before it; arrays as in `Batch`.

        Steps are skipped as by `train_step`. A run that has diverged stays as it was.
        """
        before = state.train
        train, means = train_step(
            before, standardised(images), labels, self.model(axis_name), self.optimizer,
            loss=functools.partial(cross_entropy, label_smoothing=self.label_smoothing),
            counted=counted, axis_name=axis_name,
        )  # fmt: skip
        skip = train.skipped > before.skipped
        found = Sums(*means, 1.0)
        sums = jax.tree.map(lambda s, v: s + jnp.where(skip, 0, v), state.sums, found)
        skipped = jnp.where(skip, state.skipped + 1, 0)
        first = before.step - IN_A_ROW + 1
        new = State(train, sums, skipped, jnp.where(skipped == IN_A_ROW, first, -1))
        going = state.diverged_at < 0
        kept = jax.tree.map(functools.partial(jnp.where, going), new, state)
        return kept, means.loss

    def evaluate(
        self,
        variables: dict[str, Any],
        counts: Counts,
        images: jax.Array,
        labels: jax.Array,
        counted: jax.Array,
        *,
        axis_name: str | None = None,
    ) -> Counts:
        """The counts with those of the examples that count, by running statistics."""
        outputs = self.model(None).apply(variables, standardised(images), train=False)
        values = Counts(
            cross_entropy(outputs, labels), correct(outputs, labels),
            in_top(outputs, labels, 5), jnp.ones_like(labels),
        )  # fmt: skip
        found = jax.tree.map(lambda v: jnp.where(counted, v, 0).sum(dtype=jnp.float32), values)
        found = found if axis_name is None else jax.lax.psum(found, axis_name)
        return jax.tree.map(jnp.add, counts, found)


def standardised(images: jax.Array) -> jax.Array:
    """From uint8 `[n, height, width, 3]` to float32 of mean 0 and variance 1 on ImageNet."""
    mean, std = (v.reshape(1, 1, 1, 3) for v in (MEAN, STD))
    return (images.astype(jnp.float32) / 255 - mean) / std


class Programs:
    """A network's programs, compiled for a layout of devices when this is made.

    Args:
      network: what is trained.
      layout: of `bn_jax.measure.layouts`, other than a grid.
      batch_size: of this process's part of a batch.
      image_size: height and width.
    """

    def __init__(self, network: Network, layout: Single, batch_size: int, image_size: int):
        self._layout = layout
        alone = type(layout) is Single
        self._sharding = None if alone else NamedSharding(batch_mesh(), P(AXIS))
        batch = self.put(_zeros(batch_size, image_size))
        images, seed = np.zeros((1, image_size, image_size, 3), np.uint8), np.int32(0)
        kinds = ("rows",) * len(batch)
        init = layout.program(network.init, ("all", "all"))
        self._init = init.lower(seed, images).compile(run_once())
        self._images = images
        state = jax.eval_shape(network.init, seed, images)
        step = layout.program(network.step, ("all", *kinds), (0,))
        self._step = step.lower(state, *batch).compile()
        count = layout.program(network.evaluate, ("all", "all", *kinds))
        self._count = count.lower(_variables(state), self.zero(Counts), *batch).compile()

    def put(self, batch: Batch) -> tuple[Any, ...]:
        """Images, labels and which of them count on the devices, filled up for these."""
        arrays = (batch.images, batch.labels, batch.counted)
        if self._sharding is None:
            return jax.device_put(arrays)
        return tuple(map(self._place, arrays))

    def _place(self, v):
        devices = jax.local_device_count()
        if missing := -len(v) % devices:
            v = np.pad(v, [(0, missing), *[(0, 0)] * (v.ndim - 1)])
        parts = v.reshape(devices, -1, *v.shape[1:])
        return jax.make_array_from_process_local_data(self._sharding, parts)

    def init(self, seed: int) -> State:
        """The state before the first step."""
        return self._layout.put(self._init(np.int32(seed), self._images), "all")

    def zero(self, kind: type[Sums] | type[Counts]) -> Any:
        """Sums of nothing."""
        return self._layout.put(_zero(kind), "all")

    def step(self, state: State, batch: tuple[Any, ...]) -> tuple[State, jax.Array]:
        """As `Network.step`; the state is donated."""
        found = self._step(state, *batch)
        self._layout.wait(found)
        return found

    def count(self, state: State, counts: Counts, batch: tuple[Any, ...]) -> Counts:
        """As `Network.evaluate`."""
        found = self._count(_variables(state), counts, *batch)
        self._layout.wait(found)
        return found


def _zero(kind):
    return kind(*(jnp.zeros(()) for _ in kind._fields))


def _variables(state):
    return {"params": state.train.params, "batch_stats": state.train.batch_stats}


def _zeros(n, size):
    return Batch(
        np.zeros((n, size, size, 3), np.uint8), np.zeros(n, np.int32), *np.zeros((2, n), bool)
    )
