"""BatchNorm as the first layer: does it stand in for standardising the input?

Flatten, BatchNorm, Dense 300, BatchNorm, Dense 100, BatchNorm, Dense 10 on images as they
are stored, 0 to 255 (MNIST), with the inner BatchNorms before or after the activation, ReLU
or ELU; beside it the network without BatchNorm, on the same images and on standardised ones.
An epoch costs more with BatchNorm, so what counts is the time to an accuracy. After training
the BatchNorms are folded into the dense layers, and prediction is timed before and after.

The source is a textbook; it states neither optimizer nor rates: gradient descent here, each
arm at its own best rate.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any, ClassVar

from experiments import compare, flags
from experiments.flags import flag
from experiments.prediction import Prediction, predict_folded

EXPERIMENT = "first_layer"
QUESTION = "Does BatchNorm as the first layer stand in for standardised input?"
ACTIVATIONS = ("relu", "elu")
BATCHES = (1, 256)  # of the timed predictions
NOTHING_EXTRA = 1.1  # a folded network that takes at most so many times as long


@dataclasses.dataclass(frozen=True)
class Config(compare.Config):
    """Every flag of the experiment; see `python -m experiments.first_layer --help`."""

    QUICK: ClassVar = {
        "arms": ("standard", "none", "bn_before", "bn_after"), "seeds": 2, "steps": 300,
        "eval_every": 30, "target": 0.9, "learning_rates": (0.1,),
        "raw_learning_rates": (0.003, 0.01), "momentums": (0.9,),
    }  # fmt: skip

    dataset: str | None = flag(None, "by default mnist, and digits with --quick")
    features: tuple[int, ...] | None = flag((300, 100), "widths of the hidden layers")
    activation: str = flag("relu", "of the arms that do not name one")
    arms: tuple[str, ...] = flag(
        tuple(
            f"{name}{suffix}"
            for suffix in ("", "_elu")
            for name in ("standard", "none", "bn_before", "bn_after")
        ),
        "without BatchNorm: standard (standardised input), none (raw); bn_before and bn_after "
        "(the activation) and on the raw input; each with _elu too",
    )
    learning_rates: tuple[float, ...] = flag((0.1, 0.3, 1.0), "learning rates to try")
    raw_learning_rates: tuple[float, ...] = flag(
        (1e-3, 3e-3, 1e-2), "those of the arms without BatchNorm on raw input"
    )
    momentums: tuple[float, ...] = flag((0.99,), "momenta of the running statistics to try")
    steps: int = flag(3000, "training steps of a run")
    batch_size: int = flag(32, "examples in a training step")
    eval_every: int = flag(150, "training steps between evaluations")
    target: float | None = flag(0.95, "test accuracy to reach")
    validation_fraction: float = flag(0.1, "as in experiments.compare")
    scaling: str = flag("raw", "of the input of all arms but standard")
    max_runs_at_once: int | None = flag(1, "runs trained together: alone, time is its own")

    def __post_init__(self):
        if self.dataset is None:
            object.__setattr__(self, "dataset", "digits" if self.quick else "mnist")
        super().__post_init__()


def run(config: Config) -> dict[str, Any]:
    """Compares, fills the workdir, prints the tables; the summary comes back."""
    from experiments.watchers import Weights

    weights = Weights(lambda arm, seed: seed == config.seed)
    return compare.run(
        config, experiment=EXPERIMENT, question=QUESTION, known=arms(config), watch=weights,
        extra=lambda training: extra(training, weights.kept),
    )  # fmt: skip


def arms(config: Config) -> dict[str, compare.Arm]:
    """The eight networks, and the other norms of `experiments.compare`."""
    from bn_jax.linen import BatchNorm

    four = {
        "standard": compare.Arm(None, {"scaling": "standard"}),
        "none": compare.Arm(None, {"learning_rates": config.raw_learning_rates}),
        "bn_before": compare.Arm(BatchNorm, {"places": ("input", "before")}),
        "bn_after": compare.Arm(BatchNorm, {"places": ("input", "after")}),
    }
    elu = {
        f"{name}_elu": arm._replace(changes={**arm.changes, "activation": "elu"})
        for name, arm in four.items()
    }
    return compare.norm_arms() | four | elu


def extra(training: compare.Training, weights: dict) -> compare.Extra:
    """Time of an epoch in every arm, and of prediction with the best BatchNorm folded."""
    rows, best = list(times(training)), best_normed(training.summary)
    if best:
        rows += predictions(training, best["arm"], folded(training, weights, best))
    return compare.Extra({"published": rows})


def best_normed(summary: dict) -> dict | None:
    """The arm with BatchNorm that is most accurate; None where there is none."""
    normed = [arm for arm in summary["arms"] if arm["momentum"] is not None]
    return max(normed, key=lambda arm: arm["max_accuracy"]["median"], default=None)


def times(training: compare.Training) -> Iterator[dict]:
    """Seconds of an epoch; with BatchNorm it should cost more than without, on raw input."""
    steps = training.dataset.train.labels.size / training.config.batch_size
    seconds = {
        name: steps
        * statistics.median(
            r["seconds"]["per_step"] for r in training.records if r["arm"] == name
        )
        for name in training.runs
    }
    for name, value in seconds.items():
        without = seconds.get("none_elu" if name.endswith("_elu") else "none")
        normed = name.startswith("bn_") and without is not None
        yield {
            "quantity": f"{name}: seconds per epoch",
            "here": f"{value:.3g}" + (f", {value / without:.2f} times none" if normed else ""),
            "source": "more than none" if normed else None,
            "agrees": value > without if normed and is_whole(training) else None,
        }


def is_whole(training: compare.Training) -> bool:
    """Whether it is the source's network on images of the source's size."""
    shape = training.dataset.train.inputs.shape[1:]
    return training.config.features == (300, 100) and shape == (28, 28, 1)


def folded(training: compare.Training, weights: dict, arm: dict) -> list[Prediction]:
    """Predictions with the arm's network of the first seed, at every size of batch."""
    from bn_jax.measure import Point
    from bn_jax.training.run import Swept

    one, point = training.runs[arm["arm"]], Point.of(arm)
    variables = weights[arm["arm"], point, training.config.seed]
    inputs = training.dataset.test.inputs
    return [
        predict_folded(one.model(Swept(*point)), variables, one.scaled(inputs[:size]))
        for size in BATCHES
    ]


def predictions(
    training: compare.Training, name: str, found: list[Prediction]
) -> Iterator[dict]:
    """Of the folded network: published is that it costs nothing extra."""
    for p in found:
        yield {
            "quantity": f"{name}: prediction of {p.batch}, folded, ms",
            "here": f"{p.milliseconds:.3g}, {p.to_unfolded:.2f} times unfolded",
            "source": None,
        }
        yield {
            "quantity": f"{name}: prediction of {p.batch} in terms of none, folded (unfolded)",
            "here": f"{p.to_without:.2f} ({p.unfolded_to_without:.2f})",
            "source": "folded nothing extra",
            "agrees": p.to_without <= NOTHING_EXTRA if is_whole(training) else None,
        }
    yield {
        "quantity": f"{name}: largest difference of folded outputs / largest output",
        "here": f"{max(p.difference for p in found):.1e}",
        "source": None,
    }


if __name__ == "__main__":
    flags.main(Config, run)
