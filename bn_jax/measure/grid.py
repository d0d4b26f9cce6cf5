"""What a sweep is over, and how long its runs are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bn_jax.errors import UserError
from bn_jax.training.run import Swept


class Point(NamedTuple):
    """One point of the grid; momentum is None for a network without running statistics."""

    learning_rate: float
    init_scale: float = 1.0
    momentum: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Point:
        """That of a record, or of an arm of a summary."""
        return cls(*(row[field] for field in cls._fields))


class Budget(NamedTuple):
    """Steps of a run, and steps between evaluations.

    With `patience` a run stops early, after so many evaluations without a higher validation
    accuracy, and goes back to where that was highest. `eval_rows` is how many examples,
    summed over the runs that are trained at once, an evaluation takes at a time. There are
    `laps` from one evaluation to the next.
    """

    steps: int
    eval_every: int
    patience: int | None = None
    # 500 runs of the circles network: 184 us a run with 1,000 examples each, 34 with 32,
    # when the activations stay in the processor's cache.
    eval_rows: int = 16_384
    laps: int = 1

    @property
    def lap(self) -> int:
        """Steps of a lap."""
        return self.eval_every // self.laps

    def check(self) -> None:
        """Raises a UserError unless evaluations divide the steps."""
        if self.steps % self.eval_every:
            raise UserError(
                f"eval_every {self.eval_every} does not divide the {self.steps} steps"
            )

    def stop(self, accuracies: Sequence[float]) -> tuple[int, int] | None:
        """The evaluation to stop after and the best one, if they say so; counted from 0."""
        if self.patience is None:
            return None
        best = 0
        for i, accuracy in enumerate(accuracies):
            if accuracy > accuracies[best]:
                best = i
            elif i - best >= self.patience:
                return i, best
        return None


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
        return self.keys.shape[0] * self.swept.learning_rate.shape[0]

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
