"""Population statistics: one estimate from the moments of many batches, after training.

Both are reductions over any iterable of `Moments`, and weight every batch by its count.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax.numpy as jnp

from bn_jax.core.arrays import promoting
from bn_jax.core.moments import Moments, merge
from bn_jax.core.running import unbiased_var, with_variance


def algorithm_2(batches: Iterable[Moments]) -> Moments:
    """Mean and unbiased variance as Ioffe & Szegedy 2015, Algorithm 2, has them.

        mean = E_B[mean_B]        var = E_B[n_B/(n_B - 1) var_B]

    E_B weights a batch by its count n_B, which is Algorithm 2 for batches of one size and
    does not let a small last batch count like a full one. How the means of the batches
    differ is in neither term: `pooled` has it. A batch with one element of a feature has a
    mean of it only; where no batch has a variance, the result has none (`has_variance`).

    Raises:
      ValueError: there are no batches.
    """
    batches = list(batches)
    whole = pooled(batches)
    measured = ((unbiased_var(batch), with_variance(batch).count) for batch in batches)
    var, measured = functools.reduce(_average, measured)
    weight = jnp.where(measured != 0, whole.weight, whole.count)
    return whole._replace(var=var, weight=weight)


def pooled(batches: Iterable[Moments]) -> Moments:
    """The moments of all elements together: `merge` of the batches (biased, as theirs).

    Raises:
      ValueError: there are no batches.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("population statistics of no batches")
    return functools.reduce(merge, batches)


@promoting
def _average(a, b):
    (value, n), (other, m) = a, b
    part = m / jnp.where(n + m != 0, n + m, 1)
    return value + part * (other - value), n + m
