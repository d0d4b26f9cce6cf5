"""How well does a network learn ImageNet with BatchNorm, on one device or on many?

Trains a network on images that are read from disk and decoded as they are needed, one
network for each arm, every batch divided over all devices. The set is `imagenet2012` of
tensorflow-datasets, or another one of labelled images, prepared as array_record files.

The settings are those of Goyal et al. 2017 ("Accurate, Large Minibatch SGD"): 90 epochs, a
rate of 0.1 for 256 examples that grows with the batch, reached within 5 epochs; momentum
0.9, L2 of 1e-4 on kernels alone, the last scale of every block 0 at the start. Besides, as is
usual since: a cosine instead of three drops (`--schedule=goyal`), label smoothing of 0.1,
bfloat16 with statistics in float32.

A set that nothing is chosen on is both: what records call validation is the test set.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.config import Norms, Optimization, Output, Processes, Source, Workdir
from bn_jax.lab.fields import check_known, fixed, flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    import jax

    from bn_jax.lab import report, sizes, statistics, workdir
    from bn_jax.lab.arms import chosen_arms, norm_arms
    from bn_jax.lab.data.stream import Records, open_split
    from bn_jax.lab.experiment import seconds, start_jax
    from bn_jax.lab.findings import Published
    from bn_jax.lab.progress import Progress
    from bn_jax.lab.report.page import write as write_page
    from bn_jax.lab.report.terminal import print_summary
    from bn_jax.lab.statistics import Point, Seconds
    from bn_jax.lab.training.distributed import everyone
    from bn_jax.lab.training.optimizers import RULES
    from bn_jax.lab.training.schedules import SCHEDULES
    from bn_jax.lab.training.signals import on_sigterm
    from experiments import imagenet_training as training
    from experiments.imagenet_training import ImageNetRecord

EXPERIMENT = "imagenet"
PER = 256  # examples, for which `learning_rate` is
# Top-1 on the validation set: Flax's ImageNet example; Ioffe & Szegedy 2015, section 4.2.2,
# BN-Baseline. Both for images of 224 x 224, as here by default.
PUBLISHED = {"resnet50": 0.767, "inception": 0.727}
NEAR = 0.01
MODELS = ("resnet50", "resnet18", "inception")


@dataclasses.dataclass(frozen=True)
class Config(Workdir, Output, Processes, Optimization, Norms, Source):
    """Every flag of the experiment; see `python -m experiments.imagenet --help`."""

    QUICK: ClassVar[dict[str, Any]] = {
        "model": "resnet18", "width": 0.25, "image_size": 64, "batch_size": 32, "steps": 20,
        "eval_every": 10, "log_every": 5, "warmup_epochs": 0.0, "test_examples": 500,
    }  # fmt: skip
    seeds: ClassVar = 1  # an arm has one run

    dataset: str = flag(
        "imagenet2012", "a set of labelled images of tensorflow-datasets, by its name"
    )
    cache_dir: str | None = flag(None, "for compiled programs; by default ~/.cache/bn_jax")
    train_examples: int | None = flag(
        None, "train on the first so many of the training examples; by default on all"
    )
    test_split: str = flag("validation", "what is tested on; nothing is chosen on it")
    image_size: int = flag(
        224, "height and width, in pixels, of what the network sees", at_least=1
    )
    model: str = flag("resnet50", "resnet50, resnet18 or inception", choices=MODELS)
    width: float = flag(1.0, "the network's share of its usual channels", above=0)
    dtype: str = flag(
        "bfloat16",
        "of convolutions and norms: bfloat16 or float32",
        choices=("bfloat16", "float32"),
    )
    arms: tuple[str, ...] = flag(("bn",))
    momentum: float = flag(
        0.9, "of running statistics: the weight of the old value", at_least=0, at_most=1
    )
    optimizer: str = flag("sgd_momentum")
    learning_rate: float = flag(
        0.1, f"for a batch of {PER} examples; it grows with the batch", above=0
    )
    warmup_steps: int = fixed(0)
    warmup_epochs: float = flag(
        5.0, "epochs in which the learning rate rises from 0, linearly", at_least=0
    )
    schedule: str = flag(
        "cosine",
        "of the learning rate: goyal (a tenth of it after 30, 60 and 80 of 90 epochs), cosine, "
        "constant, step, exponential, inverse or one_cycle",
    )
    l2: float = flag(1e-4)
    label_smoothing: float = flag(0.1)
    seed: int = flag(
        0, "of initial weights, of the order of the data, of what is cut out", at_least=0
    )
    batch_size: int = flag(
        PER, "examples in a training step, of all devices together", at_least=1
    )
    epochs: int = flag(90, "passes over the data", at_least=1)
    steps: int | None = flag(None, "instead of epochs: training steps", at_least=1)
    eval_every: int | None = flag(
        None, "steps between evaluations; by default an epoch's", at_least=1
    )
    workers: int | None = flag(
        None,
        "processes that decode; 0: this one does; by default one for each core but one",
        at_least=0,
        at_most=1000,
    )
    max_bad_examples: int = flag(
        0,
        "broken images that the training set, or the test set, may have; they are left out",
        at_least=0,
    )
    log_every: int = flag(100, "training steps after which the loss is shown", at_least=1)
    quick: bool = flag(
        False, "a small network, few small images: a look in some minutes on two cores"
    )
    checkpoint_every: float = flag(600.0, "seconds between checkpoints; 0: after every step")

    @property
    def highest_rate(self) -> float:
        """For this batch (Goyal et al. 2017, section 2.1)."""
        return self.learning_rate * self.batch_size / PER

    @property
    def evaluations(self) -> list[int]:
        """The steps after which there is one."""
        steps, every = self.steps or 0, self.eval_every or 1  # `open_sets` has filled them in
        return [*range(0, steps, every), steps]


def run(config: Config) -> dict[str, Any]:
    """Trains the arms, fills the workdir, prints the table; the summary comes back."""
    start = time.perf_counter()
    started = start_jax(config, config.cache_dir)
    command = workdir.command(config, EXPERIMENT)
    config, warmup, train, test = open_sets(config)
    records: list[ImageNetRecord] = []
    networks = {
        name: training.network(config, arm, train.num_classes, warmup)
        for name, arm in chosen_arms(config.arms, norm_arms()).items()
    }
    with workdir.entered(config, EXPERIMENT) as (folder, shared):
        if (finished := workdir.finished(shared)) is not None:
            return finished
        settings = workdir.write_config(folder, config, EXPERIMENT, **started, command=command)
        with on_sigterm() as stop, Progress(config.evaluations[-1] * len(networks)) as progress:
            for name, net in networks.items():
                progress.describe(name)
                place = shared / "checkpoints" / name
                one = training.Training(config, train, test, net, place, stop, progress.advance)
                at = one.run()
                records.append(record(config, name, at, int(everyone(one.state.skipped))))
                lines = [record.to_json() for record in records]
                report.rewrite_records(folder / "records.jsonl", lines).close()
        return write(config, records, settings, folder, time.perf_counter() - start)


def open_sets(config: Config) -> tuple[Config, int, Records, Records]:
    """The flags with the steps that follow from the data, those of the warm-up, and two sets.

    Raises:
      UserError: of the data; a flag is unknown, or does not fit the data.
    """
    check_known("optimizer", [config.optimizer], RULES)
    check_known("schedule", [config.schedule], ("goyal", *SCHEDULES))

    def opened(split, most):
        records = open_split(config.dataset, config.data_dir, split)
        if most is None or most >= len(records.data):
            return records
        return open_split(config.dataset, config.data_dir, f"{split}[:{most}]")

    train = opened("train", config.train_examples)
    test = opened(config.test_split, config.test_examples)
    examples, size = len(train.data), config.batch_size
    if size > examples or size % jax.process_count():
        raise UserError(
            f"--batch_size={size}: choose at most the {examples} training examples of "
            f"{config.dataset}, and a multiple of the {jax.process_count()} processes"
        )
    if config.bn_group_size and size % config.bn_group_size:
        raise UserError(
            f"--bn_group_size={config.bn_group_size} does not divide {size} examples"
        )
    epoch = examples // size
    steps = config.steps or config.epochs * epoch
    every, warmup = min(config.eval_every or epoch, steps), round(config.warmup_epochs * epoch)
    if warmup >= steps:
        raise UserError(
            f"--warmup_epochs={config.warmup_epochs:g} are {warmup} of {steps} steps: choose "
            "fewer, or more steps"
        )
    config = dataclasses.replace(config, quick=False, steps=steps, eval_every=every)
    sizes.check_records(config, [(len(config.arms), steps, every)])
    return config, warmup, train, test


def record(config: Config, name: str, at: training.Position, skipped: int) -> ImageNetRecord:
    """Returns what an arm measured."""
    momentum = config.momentum if norm_arms()[name].has_momentum else None
    point = Point(config.highest_rate, 1.0, momentum)
    end = config.evaluations[-1] if at.diverged_at is None else at.diverged_at
    found = [h for h in at.history if h["step"] <= end and math.isfinite(h["test_loss"])]

    def series(metric):
        values = [round(h[metric], 6) if math.isfinite(h[metric]) else None for h in found]
        return values + [None] * (len(config.evaluations) - len(values))

    loss, accuracy = series("test_loss"), series("test_accuracy")
    per_step = at.training / max(at.step, 1)
    return ImageNetRecord(
        arm=name,
        learning_rate=point.learning_rate,
        init_scale=point.init_scale,
        momentum=point.momentum,
        seed=config.seed,
        steps=list(config.evaluations),
        train_loss=series("train_loss"),
        train_accuracy=series("train_accuracy"),
        validation_loss=loss,
        validation_accuracy=accuracy,
        test_loss=loss,
        test_accuracy=accuracy,
        test_top5_accuracy=series("test_top5_accuracy"),
        diverged_at=at.diverged_at,
        bad_examples=at.bad + at.test_bad,
        skipped_steps=skipped,
        seconds=Seconds(per_step, at.training, at.evaluation, compilation=at.compilation),
    )


def write(
    config: Config,
    records: list[ImageNetRecord],
    settings: dict[str, Any],
    folder: Path,
    total: float,
) -> dict[str, Any]:
    """Leaves the page and the summary, which comes back."""
    question = (
        f"How well does this {config.model} learn {config.dataset}? Tested on its split "
        f"{config.test_split}, on which nothing is chosen."
    )
    settings["seconds"] = seconds(records, total)
    rows = [row.to_json() for record in records for row in published(config, record)]
    summary = {
        "experiment": EXPERIMENT, "question": question, "dataset": config.dataset,
        "model": config.model, "published": rows,
        **statistics.summarize(
            records, baseline=config.arms[0], target=config.target
        ).to_json(),
        "seconds": settings["seconds"],
    }  # fmt: skip
    page = write_page(records, summary, settings, folder)
    print_summary(summary)
    print(page)
    return summary


def published(config: Config, record: ImageNetRecord) -> list[Published]:
    """What an arm ended with, beside what was published of such a network."""
    top1, top5 = (record.final(f"test_{k}") for k in ("accuracy", "top5_accuracy"))
    whole = config.width == 1 and config.dataset.startswith("imagenet2012")
    source = PUBLISHED.get(config.model) if whole and record.arm == "bn" else None
    beside = (f"{source:.1%}", top1 > source - NEAR) if source else (None, None)
    rate = config.batch_size / record.seconds.per_step
    arm = record.arm
    return [
        Published(f"{arm}: top-1 at the end", f"{top1:.1%}", *beside),
        Published(f"{arm}: top-5 at the end", f"{top5:.1%}"),
        Published(f"{arm}: images per second in training", f"{rate:,.0f}"),
        Published(f"{arm}: broken images left out", str(record.bad_examples)),
        Published(f"{arm}: steps skipped", str(record.skipped_steps)),
    ]


if __name__ == "__main__":
    flags.main(Config, "experiments.imagenet")
