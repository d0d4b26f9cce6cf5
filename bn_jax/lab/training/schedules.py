"""Learning-rate schedules as factors on the learning rate, so that a sweep may sweep that."""

from __future__ import annotations

from collections.abc import Callable

import optax


def constant(steps: int, decay_steps: int, decay_rate: float) -> optax.Schedule:
    """1."""
    return optax.constant_schedule(1.0)


def step(steps: int, decay_steps: int, decay_rate: float) -> optax.Schedule:
    """decay_rate^floor(t / decay_steps)."""
    return optax.exponential_decay(1.0, decay_steps, decay_rate, staircase=True)


def exponential(steps: int, decay_steps: int, decay_rate: float) -> optax.Schedule:
    """decay_rate^(t / decay_steps)."""
    return optax.exponential_decay(1.0, decay_steps, decay_rate)


def inverse(steps: int, decay_steps: int, decay_rate: float) -> optax.Schedule:
    """1 / (1 + decay_rate t / decay_steps): Keras' `decay` is decay_rate at decay_steps 1."""
    return lambda count: 1 / (1 + decay_rate * count / decay_steps)


def cosine(steps: int, decay_steps: int, decay_rate: float) -> optax.Schedule:
    """(1 + cos(pi t / steps)) / 2 (Loshchilov & Hutter 2017, without restarts)."""
    return optax.cosine_decay_schedule(1.0, steps)


def one_cycle(steps: int, decay_steps: int, decay_rate: float) -> optax.Schedule:
    """Up from 1/25 to 1 over 30 % of the steps, then down to 1/250,000 (Smith & Topin 2018)."""
    return optax.cosine_onecycle_schedule(steps, 1.0)


SCHEDULES: dict[str, Callable[[int, int, float], optax.Schedule]] = {
    "constant": constant,
    "step": step,
    "exponential": exponential,
    "inverse": inverse,
    "cosine": cosine,
    "one_cycle": one_cycle,
}


def schedule(
    name: str,
    steps: int,
    *,
    decay_steps: int | None = None,
    decay_rate: float = 0.1,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """The factor on the learning rate at step t = 0, 1, ...

    Args:
      name: a key of `SCHEDULES`, whose docstrings have the formulas.
      steps: of training, those of the warm-up among them.
      decay_steps, decay_rate: of `step`, `exponential` and `inverse`; a third of the steps
        by default.
      warmup_steps: the factor rises from 0 to 1 in so many steps, linearly (Goyal et al.
        2017), and the schedule begins after them.
    """
    rest = max(steps - warmup_steps, 1)
    shape = SCHEDULES[name](rest, decay_steps or max(rest // 3, 1), decay_rate)
    if not warmup_steps:
        return shape
    rise = optax.linear_schedule(0.0, 1.0, warmup_steps)
    return optax.join_schedules([rise, shape], [warmup_steps])
