"""The gradient through time of a recurrent network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bn_jax.training.metrics import cross_entropy


def gradient_norms(
    model: Any,
    variables: Any,
    inputs: jax.Array,
    labels: jax.Array,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """How much of the gradient reaches the hidden state of each step, `[T]`.

        norm_t = sqrt(1/n sum_i |dL/dh_ti|^2),    L = sum_j loss_j

    with the statistics of the batch, as training sees it: a BatchNorm makes the loss of every
    example depend on the states of all. (Cooijmans et al. 2016, Figure 1a.)

    Args:
      model: in which the hidden state `[n, features]` goes through `perturb` within a scan of
        T steps, as that of `bn_jax.models.LSTM` does, and nothing else goes through it.
      variables: `params`, and `batch_stats` if it has any.
      inputs, labels: `[n, ...]` as the model takes them, `[n]`.
      loss: (outputs, labels) to the loss of every example.
      key: of the model's dropout and noise.
    """

    def run(variables, *collections):
        return model.apply(
            variables, inputs, train=True, mutable=["batch_stats", *collections],
            rngs=None if key is None else {"dropout": key},
        )  # fmt: skip

    def total(perturbations):
        outputs, _ = run({**variables, "perturbations": perturbations})
        return loss(outputs, labels).sum()

    _, made = jax.eval_shape(lambda: run(variables, "perturbations"))
    zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), made["perturbations"])
    (gradient,) = jax.tree.leaves(jax.grad(total)(zeros))
    # A gradient that vanished is 1e-30, whose square is 0 in float32.
    largest = jnp.abs(gradient).max((1, 2), keepdims=True)
    unit = gradient / jnp.where(largest > 0, largest, 1)
    return largest[:, 0, 0] * jnp.sqrt((unit**2).sum(2).mean(1))
