"""Two CIFAR-10 networks, each with and without BatchNorm, as tutorials in Keras have them.

Network a: three blocks of two 3x3 convolutions (32, 64, 128 channels), dense layers of 512
and 128, the norm after the activation; Adam, batches of 256, at most 300 epochs, ended early
after 5 without a better validation accuracy.

Network b: two blocks (32, 64 channels), a dense layer of 512, the norm before the activation;
RMSprop with rate 1e-4 that decays as 1 / (1 + 1e-6 t), batches of 32, images shifted and
flipped, 50 epochs. With BatchNorm its dropout is removed and its rate ten times as high.

The sources, it seems, validated on the test set; here a tenth of the training images is held
out for early stopping, and the best accuracy on the test set stands beside theirs.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from bn_jax.lab import comparison
    from bn_jax.lab.arms import Arm, norm_arms
    from bn_jax.lab.experiment import Training, parameter_counts
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.report.plotting import Style, add_legend, arm_styles, new_figure, tidy
    from bn_jax.lab.statistics import Record
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXPERIMENT = "cifar_cnn"
QUESTION = "What does BatchNorm do for two convolutional networks on CIFAR-10?"
# What a flag is when it is not given.
NETWORKS = {
    "a": {
        "model": "cifar_a", "places": ("after",), "optimizer": "adam",
        "learning_rates": (1e-3,), "schedule": "constant", "batch_size": 256, "epochs": 300,
        "patience": 5, "augment": (),
    },
    "b": {
        "model": "cifar_b", "places": ("before",), "optimizer": "rmsprop",
        "learning_rates": (1e-4,), "schedule": "inverse", "batch_size": 32, "epochs": 50,
        "augment": ("shift", "flip"),
    },
}  # fmt: skip
# Digits of 8 x 8 pixels are too small for the second unpadded block of network b.
QUICK_FEATURES = {"a": (16, 32, 64, 128, 64), "b": (16, 64)}
# Parameters and running statistics of network a with BatchNorm.
PUBLISHED_COUNTS = (1_404_970, 1_920)
# Lowest and highest accuracy, by 50 epochs.
PUBLISHED = {("b", "none"): (0.77, 0.79), ("b", "bn"): (0.87, 0.87)}
POINTS = 0.02  # so near to the published accuracy it agrees
SAME_TIME = (0.8, 1.25)  # ratios that are "about the same"
CAPTION = (
    "Loss and accuracy by epoch and by training time, of every run at its arm's best point. "
    "Solid: on the validation set, after the epoch. Dashed: in training, the mean over the "
    "batches of the epoch, with its dropout and augmentation. A run that stopped early ends "
    "where it stopped."
)


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.cifar_cnn --help`."""

    QUICK: ClassVar = {
        "dataset": "digits", "train_examples": 1000, "epochs": 20, "batch_size": 32,
        "momentums": (0.9,),
    }  # fmt: skip

    network: str = flag(
        "a", "a (BatchNorm after the activation) or b (before)", choices=("a", "b")
    )
    dataset: str = flag(None, "by default cifar10, and digits with --quick")
    model: str = flag(None, "by default cifar_a or cifar_b")
    places: tuple[str, ...] | None = flag(None, "by default after in a, before in b")
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu")
    optimizer: str = flag(None, "by default adam for a, rmsprop for b")
    learning_rates: tuple[float, ...] = flag(
        None, "by default .001 for a, .0001 for b; BatchNorm in b has ten times those"
    )
    schedule: str = flag(None, "by default constant for a, inverse for b")
    decay_steps: int | None = flag(1)
    decay_rate: float = flag(1e-6)
    momentums: tuple[float, ...] = flag(
        None, "momenta of the running statistics to try; by default .99, with --quick .9"
    )
    batch_size: int = flag(None, "by default 256 for a, 32 for b and with --quick")
    epochs: int | None = flag(None, "by default 300 for a, 50 for b, 20 with --quick")
    patience: int | None = flag(
        None, "epochs without a better validation accuracy to stop after; by default 5 for a"
    )
    augment: tuple[str, ...] = flag(None, "by default none for a, shift,flip for b")
    scaling: str = flag("unit")
    validation_fraction: float = flag(0.1)
    seeds: int = flag(1)
    summary: bool = flag(True)

    def __post_init__(self):
        own = NETWORKS.get(self.network, NETWORKS["a"])  # an unknown one is refused below
        given = {"dataset": "cifar10", "momentums": (0.99,)} | own
        if self.quick:
            given |= dict(self.QUICK) | {"features": QUICK_FEATURES[self.network]}
        for name, value in given.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()

    @property
    def is_whole(self) -> bool:
        """Whether it is the source's network and training, at its size."""
        names = (*NETWORKS["a"], "dataset", "features", "train_examples")
        return self.is_as(Config(network=self.network), names)


def run(config: Config) -> dict[str, Any]:
    """Compares, fills the workdir, prints the tables; the summary comes back."""
    return comparison.run(
        config, experiment=EXPERIMENT, question=QUESTION, known=arms(config), further=conclude
    )


def arms(config: Config) -> dict[str, Arm]:
    """The norms of a comparison; with BatchNorm network b is trained otherwise."""
    known = norm_arms()
    if config.network == "b":
        rates = tuple(float(f"{10 * rate:.9g}") for rate in config.learning_rates)
        known["bn"] = known["bn"]._replace(changes={"dropout": 0.0, "learning_rates": rates})
    return known


def conclude(training: Training[Config]) -> Findings:
    """The published numbers beside ours, and curves over the epochs."""
    published = [row for rows in (counts, accuracies, times) for row in rows(training)]
    return Findings(
        published=published, figures=[("epochs.png", CAPTION, epoch_curves(training))]
    )


def counts(training: Training[Config]) -> Iterator[Published]:
    """Parameters and running statistics of every arm."""
    config, dataset = training.config, training.dataset
    same = config.features is None and dataset.train.inputs.shape[1:] == (32, 32, 3)
    for name, one in training.runs.items():
        found = parameter_counts(one, dataset)
        source = PUBLISHED_COUNTS if (config.network, name) == ("a", "bn") else None
        yield Published(
            quantity=f"{name}: parameters + running statistics",
            here=_sum(found),
            source=source and _sum(source),
            agrees=found == source if source and same else None,
        )


def accuracies(training: Training[Config]) -> Iterator[Published]:
    """Best accuracy of every arm on the test set, and its epochs."""
    config = training.config
    for arm in training.summary.arms:
        name, best = arm.arm, arm.max_accuracy.median
        source = PUBLISHED.get((config.network, name))
        yield Published(
            quantity=f"{name}: best test accuracy",
            here=f"{best:.1%}" + ("" if config.is_whole else _size(training)),
            source=source and " to ".join(f"{v:.0%}" for v in dict.fromkeys(source)),
            agrees=_near(best, source) if source and config.is_whole else None,
        )
        last, restored = _epochs(training, arm)
        yield Published(
            quantity=f"{name}: epochs, and the best of them",
            here=f"{last:g}, {restored:g}",
            source="50" if source else None,
            claim=False,
        )


def times(training: Training[Config]) -> Iterator[Published]:
    """Training time of an epoch; published is that BatchNorm in b takes about as long."""
    low, high = SAME_TIME
    seconds = {
        arm.arm: training.config.eval_every
        * statistics.median(r.seconds.per_step for r in training.at(arm))
        for arm in training.summary.arms
    }
    base = seconds[training.config.arms[0]]
    for name, value in seconds.items():
        source = training.config.network == "b" and name == "bn"
        same = source and training.config.features is None
        yield Published(
            quantity=f"{name}: seconds per epoch, and in terms of the first arm's",
            here=f"{value:.3g}, {value / base:.2f}",
            source="about the same" if source else None,
            agrees=low <= value / base <= high if same else None,
        )


def _sum(found):
    return " + ".join(f"{n:,}" for n in found) + f" = {sum(found):,}"


def _size(training):
    images, epochs = training.dataset.train.labels.size, training.config.epochs
    return f" ({images:,} images, {epochs} epochs)"


def _near(best, source):
    low, high = source
    return low - POINTS <= best <= high + POINTS


def _epochs(training, arm):
    """Medians over the runs: the last epoch, and the one of the best validation accuracy."""
    runs = training.at(arm)
    lasts = [_last(r) for r in runs]
    bests = [_best_step(r) for r in runs]
    per_epoch = training.config.eval_every
    return statistics.median(lasts) / per_epoch, statistics.median(bests) / per_epoch


def _last(run: Record) -> int:
    return run.steps[-1] if run.stopped_at is None else run.stopped_at


def _best_step(run: Record) -> int:
    accuracies = [a or 0.0 for a in run.validation_accuracy]
    return run.steps[accuracies.index(max(accuracies))]


def epoch_curves(training: Training[Config]) -> Figure:
    """Two rows, loss and accuracy, of two panels, by epoch and by seconds."""
    figure = new_figure(height=5.4)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    styles, per_epoch = arm_styles(training.runs), training.config.eval_every
    for arm in training.summary.arms:
        name = arm.arm
        for i, run in enumerate(training.at(arm)):
            _draw_run(panels, run, per_epoch, styles[name], name if i == 0 else None)
    for row, label in zip(panels, ("cross-entropy (nats)", "accuracy (%)"), strict=True):
        for ax in row:
            tidy(ax)
        row[0].set_ylabel(label)
    for ax, label in zip(panels[1], ("epochs", "training time (s)"), strict=True):
        ax.set_xlabel(label)
        ax.set_xlim(left=0)
    panels[1, 0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    add_legend(figure, panels[0, 0])
    return figure


def _draw_run(
    panels: np.ndarray, run: Record, steps_per_epoch: int, style: Style, name: str | None
) -> None:
    """One run in all four panels; in the legend if it has a name."""
    steps = np.array([s for s in run.steps if 0 < s <= _last(run)], float)
    shown = slice(1, 1 + len(steps))
    axes_x = (steps / steps_per_epoch, steps * run.seconds.per_step)
    for row, metric, factor in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
        for ax, x in zip(row, axes_x, strict=True):
            for split in ("validation", "train"):
                y = factor * np.array(getattr(run, f"{split}_{metric}")[shown], float)
                _draw(ax, x, y, style, split, name)


def _draw(
    ax: Axes, x: np.ndarray, y: np.ndarray, style: Style, split: str, name: str | None
) -> None:
    """A line with few markers; None in the records is NaN here, and leaves a gap."""
    look = style.line() | {"linestyle": "-", "markevery": max(len(x) // 8, 1)}
    if split == "train":
        look |= {"linestyle": (0, (3, 2)), "marker": "", "linewidth": 1.0}
    label = None if name is None else f"{name}, {'training' if split == 'train' else split}"
    ax.plot(x, y, label=label, **look)


if __name__ == "__main__":
    flags.main(Config, "experiments.cifar_cnn")
