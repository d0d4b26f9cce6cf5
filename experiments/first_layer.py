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
import functools
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    import jax
    from flax import linen as nn

    from bn_jax.lab import comparison
    from bn_jax.lab.arms import Arm, norm_arms
    from bn_jax.lab.experiment import Training
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.statistics import ArmResult, Summary
    from bn_jax.lab.sweeps.timing import interleave, median_ratio
    from bn_jax.lab.watchers import Weights
    from bn_jax.linen import BatchNorm
    from bn_jax.surgery import fold

EXPERIMENT = "first_layer"
QUESTION = "Does BatchNorm as the first layer stand in for standardised input?"
ACTIVATIONS = ("relu", "elu")
BATCHES = (1, 256)  # of the timed predictions
NOTHING_EXTRA = 1.1  # a folded network that takes at most so many times as long


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.first_layer --help`."""

    QUICK: ClassVar = {
        "arms": ("standard", "none", "bn_before", "bn_after"), "seeds": 2, "steps": 300,
        "eval_every": 30, "target": 0.9, "learning_rates": (0.1,),
        "raw_learning_rates": (0.003, 0.01), "momentums": (0.9,),
    }  # fmt: skip

    dataset: str = flag(None, "by default mnist, and digits with --quick")
    features: tuple[int, ...] | None = flag((300, 100))
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
    learning_rates: tuple[float, ...] = flag((0.1, 0.3, 1.0))
    raw_learning_rates: tuple[float, ...] = flag(
        (1e-3, 3e-3, 1e-2),
        "those of the arms without BatchNorm on raw input",
        above=0,
        each_once=True,
    )
    momentums: tuple[float, ...] = flag((0.99,))
    steps: int = flag(3000)
    batch_size: int = flag(32)
    eval_every: int = flag(150)
    target: float | None = flag(0.95)
    validation_fraction: float = flag(0.1)
    scaling: str = flag("raw", "of the input of all arms but standard")
    max_runs_at_once: int | None = flag(1, "runs trained together: alone, time is its own")

    def __post_init__(self):
        if self.dataset is None:
            object.__setattr__(self, "dataset", "digits" if self.quick else "mnist")
        super().__post_init__()


def run(config: Config) -> dict[str, Any]:
    """Compares, fills the workdir, prints the tables; the summary comes back."""
    weights = Weights(lambda arm, seed: seed == config.seed)
    return comparison.run(
        config, experiment=EXPERIMENT, question=QUESTION, known=arms(config), watch=weights,
        further=lambda training: conclude(training, weights.kept),
    )  # fmt: skip


def arms(config: Config) -> dict[str, Arm]:
    """The eight networks, and the other norms of a comparison."""
    four = {
        "standard": Arm(None, {"scaling": "standard"}),
        "none": Arm(None, {"learning_rates": config.raw_learning_rates}),
        "bn_before": Arm(BatchNorm, {"places": ("input", "before")}),
        "bn_after": Arm(BatchNorm, {"places": ("input", "after")}),
    }
    elu = {
        f"{name}_elu": arm._replace(changes={**arm.changes, "activation": "elu"})
        for name, arm in four.items()
    }
    return norm_arms() | four | elu


def conclude(training: Training[Config], weights: dict) -> Findings:
    """Time of an epoch in every arm, and of prediction with the best BatchNorm folded."""
    published, best = [*times(training)], best_normed(training.summary)
    if best:
        published += predictions(training, best.arm, folded(training, weights, best))
    return Findings(published=published)


def best_normed(summary: Summary) -> ArmResult | None:
    """The arm with BatchNorm that is most accurate; None where there is none."""
    normed = [arm for arm in summary.arms if arm.momentum is not None]
    return max(normed, key=lambda arm: arm.max_accuracy.median or 0, default=None)


def times(training: Training[Config]) -> Iterator[Published]:
    """Seconds of an epoch; with BatchNorm it should cost more than without, on raw input."""
    steps = training.dataset.train.labels.size / training.config.batch_size
    seconds = {
        name: steps
        * statistics.median(r.seconds.per_step for r in training.records if r.arm == name)
        for name in training.runs
    }
    for name, value in seconds.items():
        without = seconds.get("none_elu" if name.endswith("_elu") else "none")
        normed = name.startswith("bn_") and without is not None
        without = without or value
        yield Published(
            quantity=f"{name}: seconds per epoch",
            here=f"{value:.3g}" + (f", {value / without:.2f} times none" if normed else ""),
            source="more than none" if normed else None,
            agrees=value > without if normed and is_whole(training) else None,
        )


def is_whole(training: Training[Config]) -> bool:
    """Whether it is the source's network on images of the source's size."""
    shape = training.dataset.train.inputs.shape[1:]
    return training.config.features == (300, 100) and shape == (28, 28, 1)


def folded(training: Training[Config], weights: dict, arm: ArmResult) -> list[Prediction]:
    """Predictions with the arm's network of the first seed, at every size of batch."""
    name, point = arm.arm, arm.point
    model, variables = training.model(name, point), weights[name, point, training.config.seed]
    inputs = training.runs[name].scaled(training.dataset.test.inputs[: max(BATCHES)])
    return [predict_folded(model, variables, inputs[:size]) for size in BATCHES]


def predictions(
    training: Training[Config], name: str, found: list[Prediction]
) -> Iterator[Published]:
    """Of the folded network: published is that it costs nothing extra."""
    for p in found:
        yield Published(
            quantity=f"{name}: prediction of {p.batch}, folded, ms",
            here=f"{p.milliseconds:.3g}, {p.to_unfolded:.2f} times unfolded",
            claim=False,
        )
        yield Published(
            quantity=f"{name}: prediction of {p.batch} in terms of none, folded (unfolded)",
            here=f"{p.to_without:.2f} ({p.unfolded_to_without:.2f})",
            source="folded nothing extra",
            agrees=p.to_without <= NOTHING_EXTRA if is_whole(training) else None,
        )
    yield Published(
        quantity=f"{name}: largest difference of folded outputs / largest output",
        here=f"{max(p.difference for p in found):.1e}",
        claim=False,
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
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


def predict_folded(
    model: nn.Module, variables: dict[str, Any], x: jax.Array, rounds: int = 300
) -> Prediction:
    """Folds a model of `bn_jax.lab.models`, and times it beside itself on the examples x."""
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


if __name__ == "__main__":
    flags.main(Config, "experiments.first_layer")
