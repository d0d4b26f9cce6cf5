"""Optimizers by name; their learning rate may be traced, which is how sweeps sweep it."""

from __future__ import annotations

from collections.abc import Callable

import optax


def sgd(learning_rate) -> optax.GradientTransformation:
    """Plain gradient descent."""
    return optax.sgd(learning_rate)


def sgd_momentum(learning_rate) -> optax.GradientTransformation:
    """Gradient descent with momentum 0.9."""
    return optax.sgd(learning_rate, momentum=0.9)


def adam(learning_rate) -> optax.GradientTransformation:
    """Adam with its customary constants (Kingma & Ba 2015)."""
    return optax.adam(learning_rate)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
    "adam": adam,
}
