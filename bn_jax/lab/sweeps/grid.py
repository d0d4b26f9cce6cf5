"""A grid of points and seeds, in rectangles that are trained at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bn_jax.lab.statistics.records import Point
from bn_jax.lab.training.run import Swept


class Chunk(NamedTuple):
    """A rectangle of the grid that is trained at once.

    `keys` and `swept` are filled up to the common size with copies of the last; `points`
    and `seeds` are what is wanted.
    """

    points: Sequence[Point]
    seeds: Sequence[int]
    keys: jax.Array
    swept: Swept

    @property
    def runs(self) -> int:
        """How many runs are trained, those that only fill up included."""
        return self.keys.shape[0] * jnp.size(self.swept.learning_rate)

    @property
    def wanted(self) -> list[tuple[tuple[int, int], Point, int]]:
        """Those that do not only fill up: place in arrays `[points, seeds]`, point, seed."""
        pairs = itertools.product(enumerate(self.points), enumerate(self.seeds))
        return [((i, j), point, seed) for (i, point), (j, seed) in pairs]


def chunks(
    points: Sequence[Point], seeds: Sequence[int], limit: int, block: tuple[int, int] = (1, 1)
) -> Iterator[Chunk]:
    """The grid in rectangles, all of one size: one compilation.

    A rectangle is `block` rectangles of at most `limit` runs each, one for each device.
    """
    wide = _even(-(-len(seeds) // block[1]), limit)
    high = _even(-(-len(points) // block[0]), limit // wide) * block[0]
    wide *= block[1]
    for i in range(0, len(points), high):
        for j in range(0, len(seeds), wide):
            some_points, some_seeds = points[i : i + high], seeds[j : j + wide]
            keys = jax.vmap(jax.random.key)(jnp.array(_filled(some_seeds, wide)))
            yield Chunk(some_points, some_seeds, keys, _swept(_filled(some_points, high)))


def _even(count, limit):
    """The size of as few parts of `count` as have no more than `limit`: none much smaller."""
    return -(-count // -(-count // limit))


def _filled(items, size):
    return [*items, *[items[-1]] * (size - len(items))]


def _swept(points):
    # A network without running statistics ignores its momentum.
    rows = [(p.learning_rate, p.init_scale, p.momentum or 0.0) for p in points]
    return Swept(*jnp.array(rows, jnp.float32).T)
