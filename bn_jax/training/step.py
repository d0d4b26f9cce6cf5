"""The training step and the evaluation: pure functions, jitted where they are used."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bn_jax.training.metrics import correct, cross_entropy
from bn_jax.training.skip import skip_nonfinite
from bn_jax.training.state import TrainState


class Metrics(NamedTuple):
    """Cross-entropy in nats and right answers, both summed over examples, float32 `[]`."""

    loss: jax.Array
    accuracy: jax.Array


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
) -> tuple[TrainState, jax.Array]:
    """One step on one batch: the next state, and the mean loss before it, `[]`.

    Where the loss, a gradient or a running statistic would not be finite the step is counted
    as skipped, and changes nothing else than the number of steps. (Of an input of 3e38 the
    variance is infinite, and loss and gradients are finite.)
    """
    after, loss, grads = unguarded_step(state, inputs, labels, model, optimizer)
    kept, skipped = skip_nonfinite(state, after, loss, grads, after.batch_stats)
    return kept._replace(step=after.step, skipped=state.skipped + skipped), loss


def unguarded_step(
    state: TrainState,
    inputs: jax.Array,
    labels: jax.Array,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, jax.Array, Any]:
    """The next state whatever it is, the mean loss before the step, and its gradients."""

    def loss_fn(params):
        outputs, updates = model.apply(
            _variables(params, state.batch_stats),
            inputs,
            train=True,
            mutable=["batch_stats"],
        )
        return cross_entropy(outputs, labels).mean(), updates.get("batch_stats", {})

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    after = TrainState(state.step + 1, params, stats, opt_state, state.skipped)
    return after, loss, grads


def evaluate_chunk(
    state: TrainState,
    model: nn.Module,
    inputs: jax.Array,
    labels: jax.Array,
    counted: jax.Array,
) -> Metrics:
    """Loss and accuracy with running statistics, summed over the examples that count.

    Args:
      state: of the run.
      model: applied with `train=False`.
      inputs, labels: `[n, ...]` as the model takes them, `[n]`.
      counted: bool `[n]`; False for examples that only fill up the chunk.
    """
    outputs = model.apply(_variables(state.params, state.batch_stats), inputs, train=False)
    loss = jnp.where(counted, cross_entropy(outputs, labels), 0)
    hits = counted & correct(outputs, labels)
    return Metrics(loss.sum(), hits.sum().astype(jnp.float32))


def _variables(params, batch_stats):
    return {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
