"""Does normalising make this network train faster, at which learning rates, how surely?

Trains a network with and without BatchNorm (or other norms) over a grid of learning rates
and seeds, and compares the number of steps, and of seconds, to a test accuracy: each arm
at its own best learning rate, and all at the same.

By default: the network of Ioffe & Szegedy 2015, section 4.1 (three layers of 100 sigmoids,
batches of 60) on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar

from bn_jax.errors import UserError
from bn_jax.lab.flags import SMALLEST, Quick, check_values, flag

# What makes the networks of 224x224 images ones of 32x32 (Inception's of some 40 ms a step on
# two cores).
NARROW = {
    "inception": {"stem": "small", "width": 0.25, "blocks": ("3c", "4a", "4e", "5b")},
    "resnet18": {"stem": "small", "width": 0.25},
    "resnet50": {"stem": "small", "width": 0.25},
}


@dataclasses.dataclass(frozen=True)
class Shared(Quick):
    """The flags, and the checks, that a comparison shares with `experiments.imagenet`."""

    # Flags that are lists of one or more, each once.
    LISTS: ClassVar[tuple[str, ...]] = ("arms",)
    # Numbers of at least 1.
    COUNTS: ClassVar[tuple[str, ...]] = (
        "train_examples", "test_examples", "steps", "epochs", "batch_size", "eval_every",
    )  # fmt: skip
    # Numbers with the smallest and the largest value that makes sense; None is always allowed.
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "label_smoothing": (0, 1), "l2": (0, math.inf), "weight_decay": (0, math.inf),
        "bn_group_size": (0, math.inf), "checkpoint_every": (0, math.inf),
    }  # fmt: skip

    data_dir: str | None = flag(
        None, "of tensorflow-datasets; else TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    cache_dir: str | None = flag(
        None, "for decoded datasets and compiled programs; by default ~/.cache/bn_jax"
    )
    test_examples: int | None = flag(
        None, "test on the first so many of the test examples; by default on all"
    )
    bn_group_size: int | None = flag(
        None,
        "examples that share statistics in a BatchNorm, however many devices there are; by "
        "default all of the batch; 0: those of a device",
    )
    target: float | None = flag(
        None, "test accuracy to reach, in (0, 1]; by default the best that the baseline reached"
    )
    coordinator: str | None = flag(
        None, "host:port of process 0, where several processes are one run: see docs/scaling.md"
    )
    num_processes: int | None = flag(None, "how many processes there are")
    process_id: int | None = flag(None, "which of them this is, from 0")
    workdir: str | None = flag(
        None, "folder for the results; by default runs/<experiment>/<time>"
    )
    overwrite: bool = flag(False, "delete the run that is in the workdir")
    resume: bool = flag(True, "go on with the run in the workdir, if its flags are the same")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as one writes in a notebook
                object.__setattr__(self, field.name, tuple(value))
        self.apply_quick()
        self.check()
        check_values(self)

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        for name in self.COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}={value}: it must be at least 1")
        for name in self.LISTS:
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) != len(values)):
                raise UserError(f"--{name}={listed(values)}: name one or more, each once")
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                span = f"from {low} to {high}" if high < math.inf else f"at least {low}"
                raise UserError(f"--{name}={value}: it must be {span}")
        if self.target is not None and not 0 < self.target <= 1:
            raise UserError(f"--target={self.target}: an accuracy is in (0, 1]")

    def is_as(self, other: Shared, names: Iterable[str]) -> bool:
        """Whether these flags have the same values in both."""
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclasses.dataclass(frozen=True)
class Config(Shared):
    """Every flag of a comparison; see `python -m experiments.compare --help`.

    An experiment that rests on it is a subclass with other defaults and with `QUICK`, what
    `--quick` changes of them. A flag that is given stands, with `--quick` too.
    """

    LISTS: ClassVar = ("learning_rates", "init_scales", "momentums", "arms", "places")
    COUNTS: ClassVar = (
        *Shared.COUNTS, "seeds", "max_runs_at_once", "patience", "decay_steps",
    )  # fmt: skip
    RANGES: ClassVar = Shared.RANGES | {
        "dropout": (0, 1), "decay_rate": (0, math.inf), "warmup_steps": (0, math.inf),
        "clip": (SMALLEST, math.inf),
    }  # fmt: skip
    POSITIVE: ClassVar[tuple[str, ...]] = ("learning_rates", "init_scales")
    QUICK: ClassVar[dict[str, Any]] = {"seeds": 2, "steps": 300}

    dataset: str = flag(
        "digits",
        "circles, digits, or an image classification set of tensorflow-datasets by its name, "
        "such as mnist, fashion_mnist, cifar10",
    )
    train_examples: int | None = flag(
        None, "train on so many of the training examples, chosen at random; by default on all"
    )
    validation_fraction: float = flag(
        0.2,
        "share of the training examples held out, to choose learning rates on; 0: train on "
        "all, and choose on them",
    )
    scaling: str = flag(
        "standard",
        "of the input: standard (mean 0, variance 1), unit (at most 1), raw, binary (0 or 1)",
    )
    augment: tuple[str, ...] = flag(
        (), "changes to training images, made on the device: shift, flip, distort"
    )
    model: str = flag(
        "mlp", "mlp, cnn, cifar_a, cifar_b, airbench, lstm, inception, resnet18 or resnet50"
    )
    features: tuple[int, ...] | None = flag(
        None,
        "widths of the hidden layers (mlp, by default 100,100,100), or channels of the "
        "convolutions and last the widths of dense layers (cnn, by default 16,32,64), or one "
        "width (lstm, by default 100)",
    )
    activation: str | None = flag(
        None,
        "relu, sigmoid, tanh, elu or gelu; by default tanh in an lstm, relu in inception and "
        "resnets, sigmoid elsewhere",
    )
    arms: tuple[str, ...] = flag(
        ("none", "bn"),
        "norms to compare, of none, bn, layer, group; the first is the baseline",
    )
    places: tuple[str, ...] | None = flag(
        None,
        "where the norm goes: before or after the activation, input as well; in an lstm "
        "output or recurrent; by default as the model has it",
    )
    dropout: float | None = flag(
        None, "share of the units dropped after hidden layers; by default as the model has it"
    )
    optimizer: str = flag("sgd", "sgd, sgd_momentum, sgd_nesterov, rmsprop or adam")
    learning_rates: tuple[float, ...] = flag(
        (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), "learning rates to try"
    )
    schedule: str = flag(
        "constant",
        "of the learning rate: constant, step, exponential, inverse, cosine or one_cycle",
    )
    warmup_steps: int = flag(0, "steps in which the learning rate rises from 0, linearly")
    decay_steps: int | None = flag(
        None,
        "steps in which step, exponential and inverse decay once; by default a third of "
        "those after the warm-up",
    )
    decay_rate: float = flag(0.1, "what one decay multiplies the learning rate by")
    l2: float = flag(0.0, "l2 / 2 times the sum of squared kernels is added to the loss")
    weight_decay: float = flag(0.0, "kernels shrink by this times the learning rate each step")
    decay_norms: bool = flag(False, "l2 and weight_decay hold for scales and biases too")
    label_smoothing: float = flag(0.0, "share of the wanted distribution that is uniform")
    clip: float | None = flag(None, "the largest norm of the gradient")
    init_scales: tuple[float, ...] = flag((1.0,), "factors on the initial weights to try")
    momentums: tuple[float, ...] = flag(
        (0.9,),
        "momenta of BatchNorm's running statistics to try: the weight of the old value",
    )
    seeds: int = flag(5, "how many seeds at each point of the grid")
    seed: int = flag(0, "the first seed")
    steps: int = flag(1500, "training steps of a run")
    epochs: int | None = flag(
        None, "instead of steps and eval_every: passes over the data, evaluated after each"
    )
    batch_size: int = flag(60, "examples in a training step")
    eval_every: int = flag(20, "training steps between evaluations; divides steps")
    patience: int | None = flag(
        None,
        "stop a run after so many evaluations without a better validation accuracy, and go "
        "back to the best",
    )
    parallel: str = flag(
        "auto",
        "how several devices share the work: grid (runs of their own), pmap, jit or shard_map "
        "(a part of every batch), single (only one works), cores (those of a CPU, with runs of "
        "their own); auto: grid where there is a run for every device, else pmap, or in "
        "several processes shard_map; on one CPU cores for small networks, else single",
    )
    max_runs_at_once: int | None = flag(
        None, "runs trained together on a device; by default as many as fit in 2 GiB"
    )
    summary: bool = flag(False, "print the layers of every arm's network first")
    tensorboard: bool = flag(False, "write events for TensorBoard to the workdir too")
    quick: bool = flag(False, "smaller: a look in less than two minutes on two cores")
    checkpoint_every: float = flag(
        60.0, "seconds of training between checkpoints; 0: after every evaluation"
    )

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        if self.features is not None and not (self.features and min(self.features) > 0):
            raise UserError(f"--features={listed(self.features)}: name widths of at least 1")
        if not 0 <= self.seed < 2**31 - self.seeds:
            raise UserError(
                f"--seed={self.seed} --seeds={self.seeds}: seeds are from 0 to {2**31 - 1}"
            )
        for name in self.POSITIVE:
            for value in getattr(self, name):
                if not SMALLEST <= value < math.inf:
                    raise UserError(f"--{name}: {value} must be positive and finite")
        for value in self.momentums:
            if not 0 <= value < 1:
                raise UserError(f"--momentums: {value} must be in [0, 1)")
        if self.steps % self.eval_every:
            raise UserError(
                f"--eval_every={self.eval_every} does not divide --steps={self.steps}"
            )


def listed(values: Any) -> str:
    """As one writes them on the command line."""
    return ",".join(map(str, values))
