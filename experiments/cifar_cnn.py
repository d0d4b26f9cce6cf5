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
from typing import Any, ClassVar

from bn_jax.errors import UserError
from experiments import compare, flags
from experiments.flags import flag

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


@dataclasses.dataclass(frozen=True)
class Config(compare.Config):
    """Every flag of the experiment; see `python -m experiments.cifar_cnn --help`."""

    QUICK: ClassVar = {
        "dataset": "digits", "train_examples": 1000, "epochs": 20, "batch_size": 32,
        "momentums": (0.9,),
    }  # fmt: skip

    network: str = flag("a", "a (BatchNorm after the activation) or b (before)")
    dataset: str | None = flag(None, "by default cifar10, and digits with --quick")
    model: str | None = flag(None, "by default cifar_a or cifar_b")
    places: tuple[str, ...] | None = flag(None, "by default after in a, before in b")
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu")
    optimizer: str | None = flag(None, "by default adam for a, rmsprop for b")
    learning_rates: tuple[float, ...] | None = flag(
        None, "by default .001 for a, .0001 for b; BatchNorm in b has ten times those"
    )
    schedule: str | None = flag(None, "by default constant for a, inverse for b")
    decay_steps: int | None = flag(1, "as in experiments.compare")
    decay_rate: float = flag(1e-6, "as in experiments.compare")
    momentums: tuple[float, ...] | None = flag(
        None, "momenta of the running statistics to try; by default .99, with --quick .9"
    )
    batch_size: int | None = flag(None, "by default 256 for a, 32 for b and with --quick")
    epochs: int | None = flag(None, "by default 300 for a, 50 for b, 20 with --quick")
    patience: int | None = flag(
        None, "epochs without a better validation accuracy to stop after; by default 5 for a"
    )
    augment: tuple[str, ...] | None = flag(None, "by default none for a, shift,flip for b")
    scaling: str = flag("unit", "as in experiments.compare")
    validation_fraction: float = flag(0.1, "as in experiments.compare")
    seeds: int = flag(1, "how many seeds at each point of the grid")
    summary: bool = flag(True, "print the layers of every arm's network first")

    def __post_init__(self):
        if self.network not in NETWORKS:
            raise UserError(f"--network={self.network}: choose from {', '.join(NETWORKS)}")
        given = {"dataset": "cifar10", "momentums": (0.99,)} | NETWORKS[self.network]
        if self.quick:
            given |= self.QUICK | {"features": QUICK_FEATURES[self.network]}
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
    return compare.run(
        config, experiment=EXPERIMENT, question=QUESTION, known=arms(config), extra=extra
    )


def arms(config: Config) -> dict[str, compare.Arm]:
    """The norms of `experiments.compare`; with BatchNorm network b is trained otherwise."""
    known = compare.norm_arms()
    if config.network == "b":
        rates = tuple(float(f"{10 * rate:.9g}") for rate in config.learning_rates)
        known["bn"] = known["bn"]._replace(changes={"dropout": 0.0, "learning_rates": rates})
    return known


def extra(training: compare.Training) -> compare.Extra:
    """The published numbers beside ours, and curves over the epochs."""
    from bn_jax.report.epochs import CAPTION, epoch_curves

    curves = epoch_curves(training.records, training.summary, training.config.eval_every)
    published = [row for rows in (counts, accuracies, times) for row in rows(training)]
    return compare.Extra({"published": published}, (("epochs.png", CAPTION, curves),))


def counts(training: compare.Training) -> Iterator[dict]:
    """Parameters and running statistics of every arm."""
    config, dataset = training.config, training.dataset
    same = config.features is None and dataset.train.inputs.shape[1:] == (32, 32, 3)
    for name, one in training.runs.items():
        found = compare.parameter_counts(one, dataset)
        source = PUBLISHED_COUNTS if (config.network, name) == ("a", "bn") else None
        yield {
            "quantity": f"{name}: parameters + running statistics",
            "here": _sum(found),
            "source": source and _sum(source),
            "agrees": found == source if source and same else None,
        }


def accuracies(training: compare.Training) -> Iterator[dict]:
    """Best accuracy of every arm on the test set, and its epochs."""
    config = training.config
    for arm in training.summary["arms"]:
        name, best = arm["arm"], arm["max_accuracy"]["median"]
        source = PUBLISHED.get((config.network, name))
        yield {
            "quantity": f"{name}: best test accuracy",
            "here": f"{best:.1%}" + ("" if config.is_whole else _size(training)),
            "source": source and " to ".join(f"{v:.0%}" for v in dict.fromkeys(source)),
            "agrees": _near(best, source) if source and config.is_whole else None,
        }
        last, restored = _epochs(training, arm)
        yield {
            "quantity": f"{name}: epochs, and the best of them",
            "here": f"{last:g}, {restored:g}",
            "source": "50" if source else None,
        }


def times(training: compare.Training) -> Iterator[dict]:
    """Training time of an epoch; published is that BatchNorm in b takes about as long."""
    low, high = SAME_TIME
    seconds = {
        arm["arm"]: training.config.eval_every
        * statistics.median(r["seconds"]["per_step"] for r in _own(training, arm))
        for arm in training.summary["arms"]
    }
    base = seconds[training.config.arms[0]]
    for name, value in seconds.items():
        source = training.config.network == "b" and name == "bn"
        same = source and training.config.features is None
        yield {
            "quantity": f"{name}: seconds per epoch, and in terms of the first arm's",
            "here": f"{value:.3g}, {value / base:.2f}",
            "source": "about the same" if source else None,
            "agrees": low <= value / base <= high if same else None,
        }


def _sum(found):
    return " + ".join(f"{n:,}" for n in found) + f" = {sum(found):,}"


def _size(training):
    images, epochs = training.dataset.train.labels.size, training.config.epochs
    return f" ({images:,} images, {epochs} epochs)"


def _near(best, source):
    low, high = source
    return low - POINTS <= best <= high + POINTS


def _own(training, arm):
    """The arm's records at its best point."""
    from bn_jax.report.points import same_point

    return [r for r in training.records if same_point(r, arm)]


def _epochs(training, arm):
    """Medians over the runs: the last epoch, and the one of the best validation accuracy."""
    runs = _own(training, arm)
    lasts = [r["steps"][-1] if r["stopped_at"] is None else r["stopped_at"] for r in runs]
    bests = [_best_step(r) for r in runs]
    per_epoch = training.config.eval_every
    return statistics.median(lasts) / per_epoch, statistics.median(bests) / per_epoch


def _best_step(record):
    accuracies = [a or 0.0 for a in record["validation_accuracy"]]
    return record["steps"][accuracies.index(max(accuracies))]


if __name__ == "__main__":
    flags.main(Config, run)
