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
from typing import TYPE_CHECKING, Any, ClassVar

from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bn_jax.lab import comparison
    from bn_jax.lab.arms import Arm, norm_arms
    from bn_jax.lab.data import Split
    from bn_jax.lab.experiment import Training
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.report.plotting import SMALL, add_legend, new_figure
    from bn_jax.lab.report.text import in_line
    from bn_jax.lab.statistics.convergence import Estimate
    from bn_jax.lab.watchers import Weights
    from bn_jax.linen import BatchNorm
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXPERIMENT = "circles"
QUESTION = "Does BatchNorm help on two circles, before or after the activation?"
STEPS_PER_EPOCH = 500 // 32  # of the source
# Accuracy on the training and test set, of one run of each.
ACCURACIES = {"none": (0.838, 0.846), "bn": (0.846, 0.848), "bn_before": (0.826, 0.830)}
# Epochs until 80 % of the test set are right.
EPOCHS = {"none": "30 to 40", "bn": "within 20", "bn_before": "no fewer than none"}
WITHIN = 0.02  # the standard deviation of an accuracy of .84 over 500 points is .016
# Flags that make a run another one than the source's.
WHOLE = (
    "dataset", "train_examples", "test_examples", "validation_fraction", "scaling", "features",
    "activation", "optimizer", "learning_rates", "init_scales", "momentums", "batch_size",
    "steps", "target",
)  # fmt: skip

CAPTION = (
    "The data, and decision regions of one run of every arm. First panel: the points to train "
    "on are filled, those to test on hollow. Others: the colour is the probability of class "
    "1; the line is where it is one half; the points are those to test on."
)
# A marker each, as colours alone do not tell them apart for everybody.
CLASSES = (("#0072B2", "o"), ("#D55E00", "^"))


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.circles --help`."""

    QUICK: ClassVar = {"seeds": 10}

    dataset: str = flag("circles")
    features: tuple[int, ...] | None = flag((50,))
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu")
    arms: tuple[str, ...] = flag(
        ("none", "bn", "bn_before", "bn_no_affine", "bn_momentum_0", "bn_input"),
        "networks to compare, of these; bn has it after the activation, as have the variations",
    )
    places: tuple[str, ...] = flag(("after",), "where the norm goes in arms that do not say")
    optimizer: str = flag("sgd_momentum")
    learning_rates: tuple[float, ...] = flag((0.01,))
    momentums: tuple[float, ...] = flag((0.99,))
    seeds: int = flag(100)
    steps: int = flag(100 * STEPS_PER_EPOCH)
    batch_size: int = flag(32)
    eval_every: int = flag(STEPS_PER_EPOCH)
    target: float | None = flag(0.8)
    validation_fraction: float = flag(0.0)
    scaling: str = flag("raw")

    @property
    def is_whole(self) -> bool:
        """Whether it is the source's network, data and training."""
        return self.is_as(Config(), WHOLE)


def run(config: Config) -> dict[str, Any]:
    """Compares, fills the workdir, prints the tables; the summary comes back."""
    weights = Weights(lambda arm, seed: seed == config.seed)
    return comparison.run(
        config, experiment=EXPERIMENT, question=QUESTION, known=arms(), watch=weights,
        further=lambda training: conclude(training, weights.kept),
    )  # fmt: skip


def arms() -> dict[str, Arm]:
    """The six networks, and the other norms of a comparison."""
    plain = functools.partial(BatchNorm, use_scale=False, use_bias=False)
    return norm_arms() | {
        "bn_before": Arm(BatchNorm, {"places": ("before",)}),
        "bn_no_affine": Arm(plain, {"places": ("after",)}),
        "bn_momentum_0": Arm(BatchNorm, {"places": ("after",), "momentums": (0.0,)}),
        "bn_input": Arm(BatchNorm, {"places": ("input",)}),
    }


def conclude(training: Training[Config], weights: dict) -> Findings:
    """The published numbers beside ours, the data, and decision regions of the first seed."""
    dataset, figures = training.dataset, ()
    if dataset.train.inputs.shape[1:] == (2,) and dataset.num_classes == 2:
        figures = (regions(training, weights),)
    return Findings(published=[*rows(training)], figures=figures)


def rows(training: Training[Config]) -> Iterator[Published]:
    """Final accuracy and epochs to the target, of every arm; what is set otherwise here.

    Judged is a run of the source's setting.
    """
    summary, judged = training.summary, training.config.is_whole
    per_epoch = training.dataset.train.labels.size // training.config.batch_size
    medians = {
        a.arm: [
            v and v / per_epoch for v in (a.steps_to_target.median, *a.steps_to_target.ci95)
        ]
        for a in summary.arms
    }
    for arm in summary.arms:
        name, published = arm.arm, ACCURACIES.get(arm.arm)
        own = [r for r in training.records if r.arm == name]
        final = [
            statistics.median(r.final(f"{split}_accuracy") for r in own)
            for split in ("validation", "test")
        ]
        yield Published(
            f"{name}: accuracy, training / test",
            _pair(final),
            published and _pair(published),
            _near(final, published) if judged and published else None,
        )
        yield Published(
            f"{name}: epochs to {summary.target.value:.0%}",
            _epochs(medians[name], arm),
            EPOCHS.get(name),
            _as_published(name, medians) if judged else None,
        )
    yield Published("distribution of initial weights", "normal", "uniform", claim=False)


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


def _pair(values):
    return " / ".join(f"{v:.3f}".lstrip("0") for v in values)


def _epochs(numbers, arm):
    median, *ends = numbers
    if median is None:
        return f"not reached ({arm.count} runs)"
    return in_line(Estimate(median, (ends[0], ends[1]), arm.seeds), "{:.0f}".format)


def regions(training: Training[Config], weights: dict) -> tuple[str, str, Figure]:
    """The data, and over the plane the probability of class 1.

    By the first seed at each arm's best point.
    """
    side = np.linspace(-1.6, 1.6, 160, dtype=np.float32)
    plane = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    maps, dataset = {}, training.dataset
    for arm in training.summary.arms:
        name, point = arm.arm, arm.point
        model = training.model(name, point)
        predict = jax.jit(functools.partial(model.apply, train=False))
        variables = weights[name, point, training.config.seed]
        logits = predict(variables, dataset.scaled(jnp.asarray(plane)))
        maps[name] = np.asarray(jax.nn.sigmoid(logits[:, 0])).reshape(side.size, side.size)
    figure = decision_regions(maps, side, dataset.train, dataset.test)
    return "decision_regions.png", CAPTION, figure


def decision_regions(
    maps: dict[str, np.ndarray], side: np.ndarray, train: Split, test: Split
) -> Figure:
    """A panel of the data, and one for each arm.

    Args:
      maps: by arm the probability of class 1, `[n, n]`, rows along the second coordinate.
      side: the n coordinates of both axes.
      train, test: points `[m, 2]` and their labels, 0 or 1 `[m]`.
    """
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    # The data, of which there is more to see, in a panel as high as all of the others.
    wide = 1.2 * rows - 0.2
    figure = new_figure(width=1.55 * (wide + columns) + 0.2, height=1.75 * rows + 0.5)
    # Axes of equal aspect end up a little lower than the layout knows.
    figure.set_layout_engine("constrained", rect=(0, 0.02, 1, 0.98))
    places = figure.add_gridspec(rows, 1 + columns, width_ratios=[wide, *[1] * columns])
    data = figure.add_subplot(places[:, 0])
    _data(data, train, test)
    data.set(xlim=(side[0], side[-1]), ylim=(side[0], side[-1]))
    data.locator_params(nbins=4)
    for i, (name, probability) in enumerate(maps.items()):
        row, column = divmod(i, columns)
        ax = figure.add_subplot(places[row, 1 + column], sharex=data, sharey=data)
        ax.contourf(side, side, probability, np.linspace(0, 1, 21), cmap="RdBu_r", alpha=0.6)
        ax.contour(side, side, probability, [0.5], colors="black", linewidths=1)
        for own, (color, _) in zip(_by_class(test), CLASSES, strict=True):
            ax.plot(*own.T, ".", color=color, markersize=1.6)
        ax.set_title(name, fontsize=SMALL + 1)
        below = i + columns < len(maps)
        ax.tick_params(labelleft=column == 0, labelbottom=not below)
    for ax in figure.axes:
        ax.set_aspect("equal")
        ax.tick_params(labelsize=SMALL)
    add_legend(figure, data)
    return figure


def _data(ax: Axes, train: Split, test: Split) -> None:
    ax.set_title("the data", fontsize=SMALL + 1)
    for use, points, fill in (("to train on", train, "full"), ("to test on", test, "none")):
        for i, (own, (color, marker)) in enumerate(
            zip(_by_class(points), CLASSES, strict=True)
        ):
            look: dict[str, Any] = {"color": color, "marker": marker, "fillstyle": fill}
            look["linestyle"] = ""
            ax.plot(*own.T, **look, markersize=2.4, markeredgewidth=0.5)
            # In the legend larger, to be told apart.
            ax.plot([], [], **look, markersize=4.5, label=f"class {i}, {len(own)} {use}")


def _by_class(points: Split) -> list[np.ndarray]:
    where, labels = map(np.asarray, points)
    return [where[labels == i] for i in range(len(CLASSES))]


if __name__ == "__main__":
    flags.main(Config, "experiments.circles")
