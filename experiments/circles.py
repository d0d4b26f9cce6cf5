"""Two circles: does BatchNorm help a network of one hidden layer, before or after the ReLU?

scikit-learn's `make_circles(1000, noise=.1)`, half of it to train on; Dense 50 ReLU, Dense 1
sigmoid; gradient descent with rate .01 and momentum .9, batches of 32, 100 epochs, 100 seeds;
the number of epochs until 80 % of the test set are right. Variations: BatchNorm without
scale and bias, with momentum 0 (the statistics of the last batch alone), on the input.

The source is a tutorial in Keras; its initial weights are uniform, ours normal.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from typing import Any, ClassVar

from bn_jax.report.text import in_line
from experiments import compare, flags
from experiments.flags import flag

EXPERIMENT = "circles"
QUESTION = "Does BatchNorm help on two circles, before or after the activation?"
STEPS_PER_EPOCH = 500 // 32  # of the source
# Accuracy on the training and test set, of one run of each.
ACCURACIES = {"none": (0.838, 0.846), "bn": (0.846, 0.848), "bn_before": (0.826, 0.830)}
# Epochs until 80 % of the test set are right.
EPOCHS = {"none": "30 to 40", "bn": "within 20", "bn_before": "no fewer than none"}
INITIAL_WEIGHTS = {
    "quantity": "distribution of initial weights", "here": "normal", "source": "uniform",
}  # fmt: skip
WITHIN = 0.02  # the standard deviation of an accuracy of .84 over 500 points is .016
# Flags that make a run another one than the source's.
WHOLE = (
    "dataset", "train_examples", "test_examples", "validation_fraction", "scaling", "features",
    "activation", "optimizer", "learning_rates", "init_scales", "momentums", "batch_size",
    "steps", "target",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(compare.Config):
    """Every flag of the experiment; see `python -m experiments.circles --help`."""

    QUICK: ClassVar = {"seeds": 10}

    dataset: str = flag("circles", "as in experiments.compare")
    features: tuple[int, ...] | None = flag((50,), "widths of the hidden layers")
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu")
    arms: tuple[str, ...] = flag(
        ("none", "bn", "bn_before", "bn_no_affine", "bn_momentum_0", "bn_input"),
        "networks to compare, of these; bn has it after the activation, as have the variations",
    )
    places: tuple[str, ...] = flag(("after",), "where the norm goes in arms that do not say")
    optimizer: str = flag("sgd_momentum", "as in experiments.compare")
    learning_rates: tuple[float, ...] = flag((0.01,), "learning rates to try")
    momentums: tuple[float, ...] = flag((0.99,), "momenta of the running statistics to try")
    seeds: int = flag(100, "how many seeds at each point of the grid")
    steps: int = flag(100 * STEPS_PER_EPOCH, "training steps of a run")
    batch_size: int = flag(32, "examples in a training step")
    eval_every: int = flag(STEPS_PER_EPOCH, "training steps between evaluations")
    target: float | None = flag(0.8, "test accuracy to reach")
    validation_fraction: float = flag(0.0, "as in experiments.compare")
    scaling: str = flag("raw", "as in experiments.compare")

    @property
    def is_whole(self) -> bool:
        """Whether it is the source's network, data and training."""
        return self.is_as(Config(), WHOLE)


def run(config: Config) -> dict[str, Any]:
    """Compares, fills the workdir, prints the tables; the summary comes back."""
    from experiments.watchers import Weights

    weights = Weights(lambda arm, seed: seed == config.seed)
    return compare.run(
        config, experiment=EXPERIMENT, question=QUESTION, known=arms(), watch=weights,
        extra=lambda training: extra(training, weights.kept),
    )  # fmt: skip


def arms() -> dict[str, compare.Arm]:
    """The six networks, and the other norms of `experiments.compare`."""
    from bn_jax.linen import BatchNorm

    plain = functools.partial(BatchNorm, use_scale=False, use_bias=False)
    return compare.norm_arms() | {
        "bn_before": compare.Arm(BatchNorm, {"places": ("before",)}),
        "bn_no_affine": compare.Arm(plain, {"places": ("after",)}),
        "bn_momentum_0": compare.Arm(BatchNorm, {"places": ("after",), "momentums": (0.0,)}),
        "bn_input": compare.Arm(BatchNorm, {"places": ("input",)}),
    }


def extra(training: compare.Training, weights: dict) -> compare.Extra:
    """The published numbers beside ours, the data, and decision regions of the first seed."""
    dataset, figures = training.dataset, ()
    if dataset.train.inputs.shape[1:] == (2,) and dataset.num_classes == 2:
        figures = (regions(training, weights),)
    return compare.Extra({"published": list(rows(training))}, figures)


def rows(training: compare.Training) -> Iterator[dict[str, Any]]:
    """Final accuracy and epochs to the target, of every arm; what is set otherwise here.

    Judged is a run of the source's setting.
    """
    summary, judged = training.summary, training.config.is_whole
    per_epoch = training.dataset.train.labels.size // training.config.batch_size
    medians = {
        a["arm"]: [v and v / per_epoch for v in _numbers(a["steps_to_target"])]
        for a in summary["arms"]
    }
    for arm in summary["arms"]:
        name, published = arm["arm"], ACCURACIES.get(arm["arm"])
        own = [r for r in training.records if r["arm"] == name]
        final = [
            statistics.median(r[f"{split}_accuracy"][-1] or 0.0 for r in own)
            for split in ("validation", "test")
        ]
        yield {
            "quantity": f"{name}: accuracy, training / test",
            "here": _pair(final),
            "source": published and _pair(published),
            "agrees": _near(final, published) if judged and published else None,
        }
        yield {
            "quantity": f"{name}: epochs to {summary['target']['value']:.0%}",
            "here": _epochs(medians[name], arm),
            "source": EPOCHS.get(name),
            "agrees": _as_published(name, medians) if judged else None,
        }
    yield INITIAL_WEIGHTS


def _near(found, published):
    return all(abs(f - p) <= WITHIN for f, p in zip(found, published, strict=True))


def _as_published(name, medians):
    """Whether the interval of the epochs allows for what was published."""
    median, low, high = medians[name]
    if name not in EPOCHS:
        return None
    if None in (median, low, high):
        return False
    if name == "none":
        return low <= 40 and high >= 30
    if name == "bn":
        return high <= 20
    without = medians.get("none", [None, None])[1]
    return None if without is None else high >= without


def _numbers(estimate):
    return estimate["median"], *(estimate["ci95"] or (None, None))


def _pair(values):
    return " / ".join(f"{v:.3f}".lstrip("0") for v in values)


def _epochs(numbers, arm):
    median, *ends = numbers
    if median is None:
        return f"not reached ({arm['reached']} of {arm['seeds']} runs)"
    return in_line({"median": median, "ci95": ends}, "{:.0f}".format, arm["seeds"])


def regions(training: compare.Training, weights: dict) -> tuple[str, str, Any]:
    """The data, and over the plane the probability of class 1.

    By the first seed at each arm's best point.
    """
    import jax
    import numpy as np

    from bn_jax.measure import Point
    from bn_jax.report.regions import CAPTION, decision_regions
    from bn_jax.training.run import Swept

    side = np.linspace(-1.6, 1.6, 160, dtype=np.float32)
    plane = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    maps = {}
    dataset = training.dataset
    for arm in training.summary["arms"]:
        name, point = arm["arm"], Point.of(arm)
        model = training.runs[name].model(Swept(*point))
        variables = weights[name, point, training.config.seed]
        logits = jax.jit(lambda v, x, m=model: m.apply(v, x, train=False))(
            variables, dataset.scaled(plane)
        )
        probability = np.asarray(jax.nn.sigmoid(logits[:, 0]))
        maps[name] = probability.reshape(side.size, side.size)
    points = (
        (np.asarray(split.inputs), np.asarray(split.labels))
        for split in (dataset.train, dataset.test)
    )
    return "decision_regions.png", CAPTION, decision_regions(maps, side, *points)


if __name__ == "__main__":
    flags.main(Config, run)
