"""Runs whose weights are drawn back to a slow average of themselves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bn_jax.training.run import Run, RunState, Swept

EVERY, DECAY, POWER = 5, 0.95, 3


class Slow(NamedTuple):
    """The optimizer's state, and slow parameters and running statistics."""

    optimizer: Any
    average: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookahead(Run):
    """A run drawn back to a slow average of its parameters and running statistics.

    After every fifth step t past `begin` (Zhang et al. 2019, "Lookahead optimizer"; here, as in
    Jordan 2024, arXiv:2404.00498, the old value's weight grows, and running statistics are
    averaged too):

        slow = d slow + (1 - d) fast, fast = slow,    d = .95^5 (t / steps)^3

    After the first such step slow is fast. At the end of an epoch, and of the run, fast is
    slow: what the steps since the average did is dropped, as in the source's code.

    Attributes:
      steps: of the run.
      epoch: steps in an epoch.
      begin: steps without it.
      others: as in `Run`.
    """

    steps: int
    epoch: int
    begin: int

    def init(self, key: jax.Array, swept: Swept, inputs: jax.Array) -> RunState:
        """As `Run.init`."""
        state = super().init(key, swept, inputs)
        return _replace(state, opt_state=Slow(state.train.opt_state, _weights(state)))

    def step(self, state: RunState, *args: Any, **kwargs: Any) -> RunState:
        """As `Run.step`."""
        inner, slow = state.train.opt_state
        state = super().step(_replace(state, opt_state=inner), *args, **kwargs)
        t = state.train.step
        decay = jnp.where(t - EVERY > self.begin, DECAY**EVERY * (t / self.steps) ** POWER, 0.0)
        averaged, fast = t % EVERY == 0, _weights(state)
        slow = jax.tree.map(
            lambda s, f: jnp.where(averaged, decay * s + (1 - decay) * f, s), slow, fast
        )
        due = averaged | (t % self.epoch == 0) | (t == self.steps)
        due &= (t // EVERY * EVERY > self.begin) & (state.diverged_at < 0)
        params, stats = jax.tree.map(functools.partial(jnp.where, due), slow, fast)
        return _replace(
            state, params=params, batch_stats=stats, opt_state=Slow(state.train.opt_state, slow)
        )


def _weights(state):
    return state.train.params, state.train.batch_stats


def _replace(state, **fields):
    return state._replace(train=state.train._replace(**fields))
