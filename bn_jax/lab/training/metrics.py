"""Loss and accuracy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    outputs: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Per-example cross-entropy in nats, `[n]`.

    Outputs `[n, classes]` are logits of a softmax; `[n, 1]` those of a sigmoid, for
    labels 0 and 1. Of the wanted distribution the share label_smoothing is uniform
    (Szegedy et al. 2016, section 7).
    """
    if outputs.shape[-1] == 1:
        wanted = (1 - label_smoothing) * labels.astype(outputs.dtype) + label_smoothing / 2
        return optax.sigmoid_binary_cross_entropy(outputs[:, 0], wanted)
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    wanted = jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
    return optax.softmax_cross_entropy(outputs, optax.smooth_labels(wanted, label_smoothing))


def correct(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the most probable class is the label, bool `[n]`; outputs as above."""
    if outputs.shape[-1] == 1:
        return (outputs[:, 0] > 0) == (labels > 0)
    return jnp.argmax(outputs, -1) == labels


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Squared error of each example, summed over the numbers to predict, `[n]`.

    Args:
      outputs: `[n]` or `[n, k]`, or `[n, 1]` for labels `[n]`.
      labels: `[n]` or `[n, k]`.
    """
    flat = labels.reshape(len(labels), -1)
    return jnp.square(outputs.reshape(flat.shape) - flat).sum(-1)


def in_top(outputs: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k most probable classes, bool `[n]`.

    Outputs are logits `[n, classes]`; of equal ones the lower class is the more probable, as
    in `correct`.
    """
    classes = jax.lax.top_k(outputs, min(k, outputs.shape[-1]))[1]
    return (classes == labels[:, None]).any(-1)
