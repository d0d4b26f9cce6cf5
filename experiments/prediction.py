"""What prediction costs with a trained network: as it is, folded, and without norms."""

from __future__ import annotations

import functools
import statistics
from typing import Any, NamedTuple


class Prediction(NamedTuple):
    """A prediction of `batch` examples.

    Attributes:
      batch: how many examples.
      milliseconds, unfolded_milliseconds, without_milliseconds: of the folded network, of that
        with BatchNorm, and of the one built without: medians over the rounds.
      to_unfolded, to_without: of the folded network's time over the others': medians over
        rounds in which each predicts once.
      unfolded_to_without: the time with BatchNorm over that without.
      difference: the largest one between outputs with BatchNorm and folded, in terms of the
        largest output.
    """

    batch: int
    milliseconds: float
    unfolded_milliseconds: float
    without_milliseconds: float
    to_unfolded: float
    to_without: float
    unfolded_to_without: float
    difference: float


def predict_folded(model: Any, variables: Any, x: Any, rounds: int = 300) -> Prediction:
    """Folds a model of `bn_jax.models`, and times it beside itself on the examples x."""
    import jax

    from bn_jax.measure.timing import interleave, median_ratio
    from bn_jax.surgery import fold

    folded, without = fold(model, variables, x, train=False), model.clone(norm=None)
    networks = {
        "unfolded": (model, variables),
        "folded": (folded.model, folded.variables),
        "without": (without, without.init(jax.random.key(0), x, train=False)),
    }
    contestants = {
        name: functools.partial(jax.jit(functools.partial(m.apply, train=False)), v, x)
        for name, (m, v) in networks.items()
    }
    seconds = interleave(contestants, rounds)
    milliseconds = {name: 1e3 * statistics.median(v) for name, v in seconds.items()}
    return Prediction(
        batch=len(x),
        milliseconds=milliseconds["folded"],
        unfolded_milliseconds=milliseconds["unfolded"],
        without_milliseconds=milliseconds["without"],
        to_unfolded=median_ratio(seconds, "folded", "unfolded"),
        to_without=median_ratio(seconds, "folded", "without"),
        unfolded_to_without=median_ratio(seconds, "unfolded", "without"),
        difference=folded.difference,
    )
