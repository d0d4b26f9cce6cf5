"""The training step and the evaluation: pure functions, jitted where they are used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from bn_jax.lab.training.metrics import correct, cross_entropy
from bn_jax.lab.training.parallel import varying
from bn_jax.lab.training.skip import undo_nonfinite
from bn_jax.lab.training.state import TrainState


class Metrics(NamedTuple):
    """Loss and accuracy (or another metric), sums or means over examples, float32 `[]`."""

    loss: jax.Array
    accuracy: jax.Array


# (outputs, labels) to the loss of every example, `[n]`; and to what is better if higher.
Loss = Callable[[Any, jax.Array], jax.Array]
Metric = Callable[[Any, jax.Array], jax.Array]


def init_state(
    key: jax.Array,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    inputs: jax.Array,
    init_scale: jax.Array | float = 1.0,
) -> TrainState:
    """A new model, every kernel of it multiplied by `init_scale`; inputs `[n, ...]`."""
    variables = model.init(key, inputs, train=False)

    def rescale(path, p):
        return p * init_scale if path[-1].key == "kernel" else p

    params = jax.tree_util.tree_map_with_path(rescale, variables["params"])
    stats = variables.get("batch_stats", {})
    return TrainState(jnp.int32(0), params, stats, optimizer.init(params), jnp.int32(0))


def train_step(
    state: TrainState,
    inputs: jax.Array,
    labels: jax.Array,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = cross_entropy,
    key: jax.Array | None = None,
    counted: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One step on one batch: the next state, and means over the batch before the step.

    Args:
      state: of the run.
      inputs, labels: `[n, ...]` as the model takes them, `[n]`.
      model: applied with `train=True`.
      optimizer: with its learning rate.
      loss: (outputs, labels) to the loss of every example.
      key: of the model's dropout.
      counted: bool `[n]`; False for examples that only fill up the batch.
      axis_name: of the devices over which the batch is laid out; the model's norms must
        share their statistics over it, or in groups.

    Where the loss, a gradient or a running statistic would not be finite the step is counted
    as skipped, and changes nothing else than the number of steps. (Of an input of 3e38 the
    variance is infinite, and loss and gradients are finite.)
    """
    after, means, grads = unguarded_step(
        state, inputs, labels, model, optimizer,
        loss=loss, key=key, counted=counted, axis_name=axis_name,
    )  # fmt: skip
    kept, skipped = undo_nonfinite(state, after, means.loss, grads, after.batch_stats)
    return kept._replace(step=after.step, skipped=state.skipped + skipped), means


def unguarded_step(
    state: TrainState,
    inputs: jax.Array,
    labels: jax.Array,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = cross_entropy,
    metric: Metric = correct,
    key: jax.Array | None = None,
    counted: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics, Any]:
    """`train_step` whatever it comes to: the state, means before the step, gradients."""
    size = inputs.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name))

    def loss_fn(params):
        given: dict[str, Any] = {} if counted is None else {"mask": counted}
        outputs, updates = model.apply(
            _variables(params, state.batch_stats),
            inputs,
            train=True,
            mutable=["batch_stats"],
            rngs=None if key is None else {"dropout": key},
            **given,
        )
        values = Metrics(loss(outputs, labels), metric(outputs, labels))
        if counted is not None:
            masked = functools.partial(jnp.where, counted)
            values = jax.tree.map(lambda v: masked(v, 0), values)
        means = jax.tree.map(lambda v: v.sum() / size, values)
        return means.loss, (means, updates.get("batch_stats", {}))

    params = varying(state.params, axis_name)
    (_, (means, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    # One all-reduce carries all of it.
    present = None if counted is None else counted.sum(dtype=jnp.float32)
    means, grads, present = _total((means, grads, present), axis_name)
    if present is not None:
        scale = size / jnp.maximum(present, 1)
        means, grads = jax.tree.map(lambda v: (v * scale).astype(v.dtype), (means, grads))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    after = TrainState(state.step + 1, params, stats, opt_state, state.skipped)
    return after, means, grads


def _total(tree, axis_name):
    return tree if axis_name is None else lax.psum(tree, axis_name)


def evaluate_chunk(
    state: TrainState,
    model: nn.Module,
    inputs: jax.Array,
    labels: jax.Array,
    counted: jax.Array,
    loss: Loss = cross_entropy,
    metric: Metric = correct,
) -> Metrics:
    """Loss and accuracy with running statistics, summed over the examples that count.

    Args:
      state: of the run.
      model: applied with `train=False`.
      inputs, labels: `[n, ...]` as the model takes them, `[n]`.
      counted: bool `[n]`; False for examples that only fill up the chunk.
      loss, metric: of every example, from outputs and labels.
    """
    variables = _variables(state.params, state.batch_stats)
    outputs: Any = model.apply(variables, inputs, train=False)
    values = loss(outputs, labels), metric(outputs, labels)
    return Metrics(*(jnp.where(counted, v, 0).sum().astype(jnp.float32) for v in values))


def _variables(params, batch_stats):
    return {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
