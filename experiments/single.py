"""One run on its own, where its weights are wanted and not only its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def train_one(
    run: Any,
    dataset: Any,
    point: dict[str, Any],
    seed: int,
    steps: int,
    *,
    every: int | None = None,
    see: Callable[[int, Any], None] = lambda step, state: None,
) -> tuple[Any, Any]:
    """The state after the run that `bn_jax.measure.sweep` makes of the point and the seed.

    Args:
      run: a `bn_jax.training.run.Run`.
      dataset: of `bn_jax.data.load`.
      point: with learning_rate, init_scale and momentum (or None).
      seed: of the run.
      steps: how many.
      every: steps between calls of `see`; divides them; by default only at the end.
      see: is given the number of steps done, 0 first, and the `RunState`.

    Returns:
      The `RunState`, and the `Swept` numbers of the point.
    """
    import jax

    from bn_jax.training.run import Swept, data_key

    momentum = point.get("momentum") or 0.0
    swept = Swept(point["learning_rate"], point["init_scale"], momentum)
    key, every = jax.random.key(seed), every or steps
    state = jax.jit(run.init)(key, swept, dataset.train.inputs)

    def advance(state, first_step):
        rows = run.batches(data_key(key), first_step, every)
        return jax.lax.scan(
            lambda s, r: (run.step(s, swept, dataset.train, r), None), state, rows
        )[0]

    advance = jax.jit(advance)
    see(0, state)
    for done in range(0, steps, every):
        state = advance(state, done)
        see(done + every, state)
    return state, swept


def apply(run: Any, swept: Any, state: Any, inputs: Any) -> Any:
    """The network's outputs at inference; inputs scaled."""
    train = state.train
    variables = {"params": train.params, "batch_stats": train.batch_stats}
    return run.model(swept).apply(variables, inputs, train=False)
