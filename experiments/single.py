"""One run on its own, where its weights are wanted on the way and no record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def train_one(
    run: Any,
    dataset: Any,
    point: Any,
    seed: int,
    budget: Any,
    see: Callable[[int, Any], None],
    *,
    parallel: str = "single",
) -> None:
    """Trains as `bn_jax.measure.sweep` does, and evaluates nothing.

    Args:
      run: a `bn_jax.training.run.Run`.
      dataset: of `bn_jax.data.load`.
      point: a `bn_jax.measure.Point`.
      seed: of the run.
      budget: a `bn_jax.measure.Budget`.
      see: is given, every `eval_every` steps, the number of steps done, 0 first, and the
        `RunState`.
      parallel: how several devices share the work, as in `bn_jax.measure.sweep`.
    """
    from bn_jax.measure.engines import prepare

    engine, chunk = prepare(run, dataset, [point], [seed], budget, parallel)
    state = engine.init(chunk)
    see(0, engine.pick(state, 0, 0))
    for done in range(0, budget.steps, budget.eval_every):
        state = engine.advance(state, chunk, done)
        see(done + budget.eval_every, engine.pick(state, 0, 0))
