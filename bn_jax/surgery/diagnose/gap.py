"""How far a model in evaluation is from what it was in training, and by which layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bn_jax.core.arrays import abs2
from bn_jax.surgery.diagnose.findings import Finding
from bn_jax.surgery.diagnose.modes import Mode
from bn_jax.surgery.diagnose.watch import Norm, run_with
from bn_jax.surgery.tree import set_leaves

# Of the output's standard deviation: the mean square is then half its variance.
GAP = 0.7
# Times what sampling gives, of so many draws.
SAMPLING = 2
DRAWS = 4


def check_gap(
    mode: Mode, variables: Any, inputs: tuple, in_training: Any, norms: list[Norm]
) -> Iterator[Finding]:
    """The gap in the output, and the layer with which half of it is there.

    Layers that have features without an update, or that use their running statistics in
    training too, stay as they are: they have a finding of their own, or no gap.

    Args:
      mode: training. Dropout and the like are the same in all runs.
      variables: of the model.
      inputs: of the first batch.
      in_training: what the model returns for them.
      norms: in the order of their first calls.
    """
    norms = [n for n in norms if n.training and not n.at_start.any()]
    paths = [n.path for n in norms]

    def gap(layers):
        return distance(run_with(mode, paths[:layers])(variables, inputs), in_training)

    if not (whole := gap(len(paths))) > GAP:
        return
    threshold = max(GAP, SAMPLING * by_sampling(mode, variables, inputs, norms))
    if whole > threshold:
        at = bisected(lambda layers: gap(layers) >= whole / 2, len(paths))
        meaning = (
            f"running statistics move the output by {whole:.2g} std, half of it by this layer"
        )
        yield Finding("train_evaluation_gap", paths[at - 1], whole, threshold, meaning)


def by_sampling(mode: Mode, variables: Any, inputs: tuple, norms: list[Norm]) -> float:
    """The root mean square by which statistics of other batches of this size move the output.

    They are drawn: the batch's, with errors of the size that they have by sampling. inf of
    one example, which says nothing about others.
    """
    if not all(jnp.isfinite(v).all() for n in norms for v in n.seen.noise):
        return math.inf
    run = run_with(mode, [n.path for n in norms])

    def output(size, draw):
        keys = jax.random.split(jax.random.key(draw), len(norms))
        new = {
            n.path: n.adapter.theirs(_drawn(n, size, key))
            for n, key in zip(norms, keys, strict=True)
        }
        return run(set_leaves(mode.model, variables, new), inputs)

    middle = output(0, 0)
    squares = (distance(output(1, draw), middle) ** 2 for draw in range(DRAWS))
    return math.sqrt(sum(squares) / DRAWS)


def bisected(holds: Callable[[int], bool], last: int) -> int:
    """The k in 1 .. last at which `holds` begins, by log2(last) trials.

    It is taken not to hold for 0, and to hold for `last`.
    """
    low = 0
    while last - low > 1:
        middle = (low + last) // 2
        low, last = (low, middle) if holds(middle) else (middle, last)
    return last


def distance(a: Any, b: Any) -> float:
    """The root mean square of a - b in standard deviations of b; the largest over a tree."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    floats = ((a, b) for a, b in leaves if jnp.issubdtype(b.dtype, jnp.inexact))
    return max((_distance(a, b) for a, b in floats), default=0.0)


def _distance(a, b):
    a, b = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in (a, b))
    # A single number has no standard deviation.
    unit = jnp.std(b) if jnp.std(b) > 0 else jnp.abs(b).mean()
    return float(jnp.sqrt(jnp.mean(abs2(a - b))) / jnp.where(unit > 0, unit, 1))


def _drawn(norm, size, key):
    batch, epsilon = norm.seen.moments, norm.epsilon
    of_mean, of_var = (
        size * jnp.sqrt(v) * jax.random.normal(k, v.shape)
        for k, v in zip(jax.random.split(key), norm.seen.noise, strict=True)
    )
    # In logarithms, as a variance is not negative.
    var = (batch.var + epsilon) * jnp.exp(of_var / (batch.var + epsilon)) - epsilon
    return {"mean": batch.mean + of_mean, "var": jnp.maximum(var, 0)}
