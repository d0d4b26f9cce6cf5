"""Does normalising make this network train faster, at which learning rates, how surely?

Trains a network with and without BatchNorm (or other norms) over a grid of learning rates
and seeds, and compares the number of steps, and of seconds, to a test accuracy: each arm
at its own best learning rate, and all at the same.

By default: the network of Ioffe & Szegedy 2015, section 4.1 (three layers of 100 sigmoids,
batches of 60) on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from bn_jax.errors import UserError
from bn_jax.lab.fields import Flags, flag

# What makes the networks of 224x224 images ones of 32x32 (Inception's of some 40 ms a step on
# two cores).
NARROW = {
    "inception": {"stem": "small", "width": 0.25, "blocks": ("3c", "4a", "4e", "5b")},
    "resnet18": {"stem": "small", "width": 0.25},
    "resnet50": {"stem": "small", "width": 0.25},
}


@dataclasses.dataclass(frozen=True)
class Source(Flags):
    """Which examples there are."""

    dataset: str = flag(
        "digits",
        "circles, digits, an image classification set of tensorflow-datasets such as mnist, "
        "fashion_mnist, cifar10; a file.npz with x_train, y_train, x_test, y_test; or "
        "package.module:name or file.py:name of such arrays or of a function that returns them",
    )
    train_examples: int | None = flag(
        None,
        "train on so many of the training examples, chosen at random; by default on all",
        at_least=1,
    )
    test_examples: int | None = flag(
        None, "test on the first so many of the test examples; by default on all", at_least=1
    )
    data_dir: str | None = flag(
        None, "of tensorflow-datasets; else TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    cache_dir: str | None = flag(
        None, "for decoded datasets and compiled programs; by default ~/.cache/bn_jax"
    )


@dataclasses.dataclass(frozen=True)
class Data(Source):
    """What a network is trained and tested on."""

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
    batch_size: int = flag(60, "examples in a training step", at_least=1)


@dataclasses.dataclass(frozen=True)
class Network(Flags):
    """What is trained, but for its norm."""

    model: str = flag(
        "mlp",
        "mlp, cnn, cifar_a, cifar_b, airbench, lstm, inception, resnet18 or resnet50; or "
        "package.module:name or file.py:name of a Linen or NNX model, its class, or a function "
        "of the number of outputs",
    )
    features: tuple[int, ...] | None = flag(
        None,
        "widths of the hidden layers (mlp, by default 100,100,100), or channels of the "
        "convolutions and last the widths of dense layers (cnn, by default 16,32,64), or one "
        "width (lstm, by default 100)",
        at_least=1,
    )
    activation: str | None = flag(
        None,
        "relu, sigmoid, tanh, elu or gelu; by default tanh in an lstm, relu in inception and "
        "resnets, sigmoid elsewhere",
    )
    places: tuple[str, ...] | None = flag(
        None,
        "where the norm goes: before or after the activation, input as well; in an lstm "
        "output or recurrent; by default as the model has it",
        each_once=True,
    )
    dropout: float | None = flag(
        None,
        "share of the units dropped after hidden layers; by default as the model has it",
        at_least=0,
        at_most=1,
    )

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        if self.features == ():
            raise UserError("--features=: name widths of at least 1")


@dataclasses.dataclass(frozen=True)
class Optimization(Flags):
    """The loss, and how it becomes less."""

    optimizer: str = flag(
        "sgd",
        "sgd, sgd_momentum, sgd_nesterov, rmsprop, adam; an alias of optax with its options, "
        "as adamw(weight_decay=0.05); or package.module:name of a function of the rate",
    )

    schedule: str = flag(
        "constant",
        "of the learning rate: constant, step, exponential, inverse, cosine or one_cycle",
    )
    warmup_steps: int = flag(
        0, "steps in which the learning rate rises from 0, linearly", at_least=0
    )
    decay_steps: int | None = flag(
        None,
        "steps in which step, exponential and inverse decay once; by default a third of "
        "those after the warm-up",
        at_least=1,
    )
    decay_rate: float = flag(0.1, "what one decay multiplies the learning rate by", at_least=0)
    l2: float = flag(
        0.0, "l2 / 2 times the sum of squared kernels is added to the loss", at_least=0
    )
    weight_decay: float = flag(
        0.0, "kernels shrink by this times the learning rate each step", at_least=0
    )
    decay_norms: bool = flag(False, "l2 and weight_decay hold for scales and biases too")
    label_smoothing: float = flag(
        0.0, "share of the wanted distribution that is uniform", at_least=0, at_most=1
    )
    clip: float | None = flag(None, "the largest norm of the gradient", above=0)


@dataclasses.dataclass(frozen=True)
class Objective(Flags):
    """What is minimised, and what is reported."""

    loss: str | None = flag(
        None,
        "of an example: cross_entropy (classes), squared_error (numbers), or "
        "package.module:name of a function (outputs, labels) -> [n]; by default as the labels "
        "are",
    )
    metric: str | None = flag(
        None,
        "better if higher: accuracy (classes), r2 (numbers: 1 - squared error / variance), or "
        "package.module:name of a function (outputs, labels) -> [n]; by default as the labels "
        "are",
    )


@dataclasses.dataclass(frozen=True)
class Norms(Flags):
    """The norms that are compared."""

    arms: tuple[str, ...] = flag(
        ("none", "bn"),
        "norms to compare; the first is the baseline. Of none, bn, layer, group; in a model of "
        "one's own also flax (as it was), instance, rms, ghost, renorm, dyt",
        each_once=True,
    )
    bn_group_size: int | None = flag(
        None,
        "examples that share statistics in a BatchNorm, however many devices there are; by "
        "default all of the batch; 0: those of a device",
        at_least=0,
    )


@dataclasses.dataclass(frozen=True)
class Grid(Flags):
    """The runs of an arm."""

    learning_rates: tuple[float, ...] = flag(
        (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), "learning rates to try", above=0, each_once=True
    )
    init_scales: tuple[float, ...] = flag(
        (1.0,), "factors on the initial weights to try", above=0, each_once=True
    )
    momentums: tuple[float, ...] = flag(
        (0.9,),
        "momenta of BatchNorm's running statistics to try: the weight of the old value",
        at_least=0,
        below=1,
        each_once=True,
    )
    seeds: int = flag(5, "how many seeds at each point of the grid", at_least=1)
    seed: int = flag(0, "the first seed", at_least=0)

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        if self.seed + self.seeds > 2**31 - 1:
            raise UserError(
                f"--seed={self.seed} --seeds={self.seeds}: seeds are from 0 to {2**31 - 1}"
            )


@dataclasses.dataclass(frozen=True)
class Length(Flags):
    """How long a run is."""

    steps: int = flag(1500, "training steps of a run", at_least=1)
    epochs: int | None = flag(
        None,
        "instead of steps and eval_every: passes over the data, evaluated after each",
        at_least=1,
    )
    eval_every: int = flag(20, "training steps between evaluations; divides steps", at_least=1)
    patience: int | None = flag(
        None,
        "stop a run after so many evaluations without a better validation accuracy, and go "
        "back to the best",
        at_least=1,
    )

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        if self.steps % self.eval_every:
            raise UserError(
                f"--eval_every={self.eval_every} does not divide --steps={self.steps}"
            )


@dataclasses.dataclass(frozen=True)
class Processes(Flags):
    """Several processes that are one run."""

    coordinator: str | None = flag(
        None, "host:port of process 0, where several processes are one run: see docs/scaling.md"
    )
    num_processes: int | None = flag(None, "how many processes there are")
    process_id: int | None = flag(None, "which of them this is, from 0")


@dataclasses.dataclass(frozen=True)
class Devices(Processes):
    """What shares the work."""

    parallel: str = flag(
        "auto",
        "how several devices share the work: grid (runs of their own), pmap, jit or shard_map "
        "(a part of every batch), single (only one works), cores (those of a CPU, with runs of "
        "their own); auto: grid where there is a run for every device, else pmap, or in "
        "several processes shard_map; on one CPU cores for small networks, else single",
    )
    max_runs_at_once: int | None = flag(
        None,
        "runs trained together on a device; by default as many as fit in 2 GiB",
        at_least=1,
    )


@dataclasses.dataclass(frozen=True)
class Workdir(Flags):
    """Where the results are left."""

    workdir: str | None = flag(
        None, "folder for the results; by default runs/<experiment>/<time>"
    )
    overwrite: bool = flag(False, "delete the run that is in the workdir")
    resume: bool = flag(True, "go on with the run in the workdir, if its flags are the same")


@dataclasses.dataclass(frozen=True)
class Output(Flags):
    """What is asked, and how often it is saved."""

    target: float | None = flag(
        None,
        "test accuracy to reach, in (0, 1]; by default the best that the baseline reached",
        above=0,
        at_most=1,
    )
    checkpoint_every: float = flag(
        60.0, "seconds of training between checkpoints; 0: after every evaluation", at_least=0
    )


@dataclasses.dataclass(frozen=True)
class Config(
    Workdir, Output, Devices, Length, Grid, Optimization, Objective, Norms, Network, Data
):
    """Every flag of a comparison; see `python -m experiments.compare --help`.

    An experiment that rests on it is a subclass with other defaults, with `QUICK`, what
    `--quick` changes of them, and with `fixed` values in place of flags that it cannot vary.
    """

    QUICK: ClassVar = {"seeds": 2, "steps": 300}

    summary: bool = flag(False, "print the layers of every arm's network first")
    tensorboard: bool = flag(False, "write events for TensorBoard to the workdir too")
    quick: bool = flag(False, "smaller: a look in less than two minutes on two cores")
