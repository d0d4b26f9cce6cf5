"""Population statistics: one estimate from the moments of many batches, after training.

Both are reductions over any iterable of `Moments`, and weight every batch by its count.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax.numpy as jnp

from bn_jax.core.moments import Moments, merge
from bn_jax.core.running import unbiased_var


def algorithm_2(batches: Iterable[Moments]) -> Moments:
    """Mean and unbiased variance as Ioffe & Szegedy 2015, Algorithm 2, has them.

        mean = E_B[mean_B]        var = E_B[n_B/(n_B - 1) var_B]

    E_B weights a batch by its count n_B, which is Algorithm 2 for batches of one size and
    does not let a small last batch count like a full one. How the means of the batches
    differ is in neither term: `pooled` has it.

    Raises:
      ValueError: there are no batches.
    """
    counted = (batch._replace(var=unbiased_var(batch)) for batch in batches)
    return _reduce(_average, counted)


def pooled(batches: Iterable[Moments]) -> Moments:
    """The moments of all elements together: `merge` of the batches (biased, as theirs).

    Raises:
      ValueError: there are no batches.
    """
    return _reduce(merge, batches)


def _average(a, b):
    count = a.count + b.count
    part = b.count / jnp.where(count > 0, count, 1)
    return Moments(a.mean + part * (b.mean - a.mean), a.var + part * (b.var - a.var), count)


def _reduce(f, batches):
    batches = list(batches)
    if not batches:
        raise ValueError("population statistics of no batches")
    return functools.reduce(f, batches)
