"""FLOP/s of a program, as a share of what one large matrix product reaches here."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bn_jax.lab.sweeps.timing import interleave


def rate(size: int, rounds: int = 9) -> float:
    """FLOP/s of the product of two float32 matrices of size x size."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product: Callable[[], Any] = functools.partial(jax.jit(jnp.dot), a, a)
    times = interleave({"product": product}, rounds)["product"]
    return 2 * size**3 / statistics.median(times)


def share(flop: float, seconds: dict[str, float], size: int) -> str:
    """A sentence: the rates of programs of so many FLOP, in terms of that of a product.

    Args:
      flop: of a program.
      seconds: that it takes, by its name; of several at once, for each of them.
      size: of the matrices.
    """
    most = rate(size)
    each = [
        f"{name} {flop / s / 1e9:.0f} GFLOP/s, {flop / s / most:.0%}"
        for name, s in seconds.items()
    ]
    return (
        f"A step is {flop / 1e9:.3g} GFLOP: {'; '.join(each)} of the {most / 1e9:.0f} GFLOP/s "
        f"of a product of {size:,} x {size:,} float32 matrices.\n"
    )
