"""The flags of `experiments.imagenet`, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from bn_jax.errors import UserError
from experiments.config import Shared
from experiments.flags import flag

PER = 256  # examples, for which `learning_rate` is
# Optimizers and schedules are known where JAX is imported.
KNOWN = {"model": ("resnet50", "resnet18", "inception"), "dtype": ("bfloat16", "float32")}


@dataclasses.dataclass(frozen=True)
class Config(Shared):
    """Every flag of the experiment; see `python -m experiments.imagenet --help`."""

    COUNTS: ClassVar = (*Shared.COUNTS, "image_size", "log_every")
    RANGES: ClassVar = Shared.RANGES | {
        "warmup_epochs": (0, math.inf), "momentum": (0, 1), "seed": (0, 2**31 - 1),
        "workers": (0, math.inf), "max_bad_examples": (0, math.inf),
    }  # fmt: skip
    QUICK: ClassVar[dict[str, Any]] = {
        "model": "resnet18", "width": 0.25, "image_size": 64, "batch_size": 32, "steps": 20,
        "eval_every": 10, "log_every": 5, "warmup_epochs": 0.0, "test_examples": 500,
    }  # fmt: skip
    # An arm has one run.
    seeds: ClassVar = 1
    init_scales: ClassVar = (1.0,)

    dataset: str = flag(
        "imagenet2012", "a set of labelled images of tensorflow-datasets, by its name"
    )
    cache_dir: str | None = flag(None, "for compiled programs; by default ~/.cache/bn_jax")
    train_examples: int | None = flag(
        None, "train on the first so many of the training examples; by default on all"
    )
    test_split: str = flag("validation", "what is tested on; nothing is chosen on it")
    image_size: int = flag(224, "height and width, in pixels, of what the network sees")
    model: str = flag("resnet50", "resnet50, resnet18 or inception")
    width: float = flag(1.0, "the network's share of its usual channels")
    dtype: str = flag(
        "bfloat16",
        "of convolutions and norms: bfloat16 or float32; parameters and statistics are float32",
    )
    arms: tuple[str, ...] = flag(
        ("bn",), "norms to train with, of none, bn, layer, group; the first is the baseline"
    )
    momentum: float = flag(
        0.9, "of BatchNorm's running statistics: the weight of the old value"
    )
    optimizer: str = flag("sgd_momentum", "sgd, sgd_momentum, sgd_nesterov, rmsprop or adam")
    learning_rate: float = flag(0.1, f"for a batch of {PER} examples; it grows with the batch")
    warmup_epochs: float = flag(5.0, "epochs in which the learning rate rises from 0, linearly")
    schedule: str = flag(
        "cosine",
        "of the learning rate: goyal (a tenth of it after 30, 60 and 80 of 90 epochs), cosine, "
        "constant, step, exponential, inverse or one_cycle",
    )
    l2: float = flag(1e-4, "l2 / 2 times the sum of squared kernels is added to the loss")
    weight_decay: float = flag(0.0, "kernels shrink by this times the learning rate each step")
    label_smoothing: float = flag(0.1, "share of the wanted distribution that is uniform")
    seed: int = flag(0, "of initial weights, of the order of the data, of what is cut out")
    batch_size: int = flag(PER, "examples in a training step, of all devices together")
    epochs: int = flag(90, "passes over the data")
    steps: int | None = flag(None, "instead of epochs: training steps")
    eval_every: int | None = flag(
        None, "training steps between evaluations; by default those of an epoch"
    )
    parallel: str = flag(
        "auto",
        "how several devices share a batch: pmap, jit or shard_map, or single (only one "
        "works); auto: pmap, of several processes shard_map",
    )
    workers: int | None = flag(
        None,
        "processes that read and decode images; 0: this one does; by default one for each "
        "core but one. They change nothing but the speed",
    )
    max_bad_examples: int = flag(
        0, "broken images that the training set, or the test set, may have; they are left out"
    )
    log_every: int = flag(
        100, "training steps after which the loss is shown; until then it stays on the device"
    )
    quick: bool = flag(
        False, "a small network, few small images: a look in some minutes on two cores"
    )
    checkpoint_every: float = flag(600.0, "seconds between checkpoints; 0: after every step")

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        for name in ("learning_rate", "width"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name}={getattr(self, name)}: it must be positive")
        check_known(self, KNOWN)
        if self.parallel in ("grid", "cores"):
            raise UserError(
                f"--parallel={self.parallel}: there is one network at a time, and no grid; "
                "choose pmap, jit or shard_map"
            )

    @property
    def learning_rates(self) -> tuple[float]:
        """The highest one of the training (Goyal et al. 2017, section 2.1)."""
        return (self.learning_rate * self.batch_size / PER,)

    @property
    def momentums(self) -> tuple[float]:
        """That of BatchNorm."""
        return (self.momentum,)


def check_known(config: Any, known: Mapping[str, Iterable[str]]) -> None:
    """Raises a UserError for a flag whose value is not among those that are known."""
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise UserError(
                f"--{name}: unknown {getattr(config, name)!r}, choose from {', '.join(values)}"
            )
