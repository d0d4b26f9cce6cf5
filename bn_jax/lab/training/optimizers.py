"""Optimizers by name; their learning rate may be traced, which is how sweeps sweep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

# The update for a learning rate of 1, of the other sign.
RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": optax.identity,
    "sgd_momentum": lambda: optax.trace(0.9),
    "sgd_nesterov": lambda: optax.trace(0.9, nesterov=True),
    "rmsprop": lambda: optax.scale_by_rms(decay=0.9, eps=1e-7, eps_in_sqrt=False),
    "adam": optax.scale_by_adam,
}


def optimizer(
    name: str,
    learning_rate: jax.Array | float,
    *,
    schedule: optax.Schedule | None = None,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    decay_norms: bool = False,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Gradient descent by one of `RULES`.

    Args:
      name: `sgd`; `sgd_momentum` (0.9); `sgd_nesterov`; `rmsprop` (decay .9); `adam`.
      learning_rate: may be traced.
      schedule: factor on it at every step; by default constant.
      l2: the gradient of l2 / 2 |w|^2 is added to the gradient.
      weight_decay: learning rate times this times w is added to the update (Loshchilov &
        Hutter 2019: "decoupled").
      decay_norms: both shrink scales and biases too, and not only kernels.
      clip: the largest norm of all gradients together.
    """
    decayed = None if decay_norms else kernels
    rate = learning_rate
    if schedule is not None:
        rate = lambda count: learning_rate * schedule(count)  # noqa: E731

    parts = (
        optax.clip_by_global_norm(clip) if clip else None,
        optax.add_decayed_weights(l2, decayed) if l2 else None,
        RULES[name](),
        optax.add_decayed_weights(weight_decay, decayed) if weight_decay else None,
        optax.scale_by_learning_rate(rate),
    )
    return optax.chain(*(part for part in parts if part is not None))


def kernels(params: Any) -> Any:
    """True for weights, False for the scales and biases of norms, and every other bias."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("scale", "bias"), params
    )
