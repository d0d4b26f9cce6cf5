"""How many images do population statistics need, and what are they worth?

Trains a network with BatchNorm, and then gives it the population statistics of 30, 100,
300 ... training images in place of its running ones (`bn_jax.surgery.recalibrate`): how far
they are from those of all training images, and the test accuracy with them. The same for
the average of the weights over the last half of training, whose running statistics are
those of other weights (Izmailov et al. 2018; Wu & Johnson 2021, "Rethinking 'Batch' in
BatchNorm", sections 3.2 and 3.3, where 1,000 to 10,000 images suffice).

By default: a small convolutional network on CIFAR-10.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.config import Data, Network, Optimization, Workdir
from bn_jax.lab.fields import flag, kinds, listed

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    import jax
    import numpy as np
    from flax import linen as nn
    from flax import traverse_util

    from bn_jax.lab import arms, report, workdir
    from bn_jax.lab.data import Dataset
    from bn_jax.lab.progress import Progress
    from bn_jax.lab.report.page import write
    from bn_jax.lab.report.terminal import print_summary
    from bn_jax.lab.sweeps import Budget, Point
    from bn_jax.lab.sweeps.engines import prepare
    from bn_jax.lab.training.metrics import correct
    from bn_jax.lab.training.run import Run, Swept
    from bn_jax.surgery import recalibrate
    from bn_jax.xla import set_up
    from experiments.recalibration_figure import CAPTION, figure, table

EXPERIMENT = "recalibration"
QUESTION = "How many images do population statistics need?"
WEIGHTS = ("last", "average")
AVERAGE_EVERY = 10  # steps


@dataclasses.dataclass(frozen=True)
class Config(Workdir, Optimization, Network, Data):
    """Every flag of the experiment; see `python -m experiments.recalibration --help`."""

    QUICK: ClassVar = {
        "dataset": "digits", "seeds": 2, "steps": 100, "images": (30, 100, 300)
    }  # fmt: skip

    dataset: str = flag("cifar10")
    model: str = flag("cnn", "cnn or mlp")
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu")
    learning_rate: float = flag(0.1, "learning rate", above=0)
    momentum: float = flag(
        0.99, "of the running statistics: the weight of the old value", at_least=0, below=1
    )
    steps: int = flag(
        1000, "training steps; weights are averaged over the last half", at_least=2
    )
    seeds: int = flag(3, "how many networks")
    seed: int = flag(0, "the first seed")
    images: tuple[int, ...] = flag(
        (30, 100, 300, 1000, 3000, 10000),
        "how many training images to recalibrate with, in ascending order",
        at_least=2,
        each_once=True,
    )
    recalibration_batch: int = flag(
        500, "images that are normalised together while recalibrating", at_least=2
    )
    quick: bool = flag(False, "digits, two seeds, 100 steps: a look in half a minute")
    parallel: str = flag(
        "auto", "how several devices train a network: single, pmap, jit, shard_map or auto"
    )

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        if sorted(self.images) != [*self.images]:
            raise UserError(f"--images={listed(self.images)}: name them in ascending order")
        self.comparison()  # has the checks of the other flags

    def comparison(self) -> CompareConfig:
        """The training of one arm, as a comparison would do it."""
        same = {k: v for k, v in vars(self).items() if k in kinds(CompareConfig)}
        return CompareConfig(
            **same, arms=("bn",), eval_every=self.steps,
            learning_rates=(self.learning_rate,), momentums=(self.momentum,),
        )  # fmt: skip


def run(config: Config) -> dict[str, Any]:
    """Measures, fills the workdir, prints the table; what `summary.json` holds comes back."""
    started = set_up()
    training = config.comparison()
    dataset = arms.load_data(training)
    available = dataset.train.labels.size
    if max(config.images) > available:
        raise UserError(
            f"--images={max(config.images)}: {config.dataset} has {available} training images"
        )
    one = arms.build_run(training, arms.norm_arms()["bn"], dataset)
    with workdir.entered(config, EXPERIMENT) as (folder, _):
        if (finished := workdir.finished(folder)) is not None:
            return finished
        settings = workdir.write_config(folder, config, EXPERIMENT, **started)
        records = measure(config, one, dataset, folder / "records.jsonl")
        summary = {
            "experiment": EXPERIMENT, "question": QUESTION, "dataset": config.dataset,
            "model": config.model, "training_images": available, "seeds": config.seeds,
            "arms": summarize(records),
        }  # fmt: skip
        summary["tables"] = [table(summary).to_json()]
        figures = [("recalibration.png", CAPTION, figure(summary["arms"]))]
        page = write((), summary, settings, folder, figures)
        print_summary(summary)
        print(page)
        return summary


Variables = dict[str, Any]
Measured = dict[str, Any]  # a line of records.jsonl


def measure(config: Config, one: Run, dataset: Dataset, path: Path) -> list[Measured]:
    """A record for every network, kind of weights and number of images, in the file at once.

    Networks with all of their records there, of an earlier start, are not trained again.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    records = report.read_records(path) if path.exists() else []
    # Of each kind of weights those of `images`, of running statistics and of all images.
    whole = len(WEIGHTS) * (len(config.images) + 2)
    done = len(records) // whole
    records = records[: done * whole]
    with (
        Progress(config.seeds) as progress,
        report.rewrite_records(path, records) as file,
    ):
        progress.advance(done)
        for seed in seeds[done:]:
            progress.describe(f"seed {seed}")
            of_run = trained(config, one, dataset, seed)
            for weights, variables in zip(WEIGHTS, of_run, strict=True):
                for found in recalibrated(config, one, dataset, variables):
                    records.append({"seed": seed, "weights": weights, **found})
                    report.append_record(file, records[-1])
            progress.advance(1)
    return records


def trained(
    config: Config, one: Run, dataset: Dataset, seed: int
) -> tuple[Variables, Variables]:
    """The variables after training, and those with the average weights."""

    @jax.jit
    def averaged(mean, new, k):
        return jax.tree.map(lambda m, p: m + (p - m) / k, mean, new)

    point = Point(config.learning_rate, 1.0, config.momentum)
    every = math.gcd(config.steps, AVERAGE_EVERY)
    budget = Budget(config.steps, every)
    engine, chunk = prepare(one, dataset, [point], [seed], budget, config.parallel)
    state, mean, count = engine.init(chunk), None, 0
    for done in range(0, config.steps, every):
        state = engine.advance(state, chunk, done)
        if done + every > config.steps // 2:
            params, count = engine.pick(state, 0, 0).train.params, count + 1
            mean = averaged(mean or params, params, count)
    train = engine.pick(state, 0, 0).train
    last = {"params": train.params, "batch_stats": train.batch_stats}
    return last, {**last, "params": mean}


def recalibrated(
    config: Config, one: Run, dataset: Dataset, variables: Variables
) -> list[Measured]:
    """Error and accuracy with running statistics (images 0) and with those of more images."""
    model = one.model(Swept(config.learning_rate, 1.0, config.momentum))
    everything = dataset.train.labels.size
    reference = recalibrate_with(config, model, dataset, variables, everything)
    candidates = [(0, variables), (everything, reference)]
    candidates[1:1] = [
        (n, recalibrate_with(config, model, dataset, variables, n)) for n in config.images
    ]
    return [
        {
            "images": n,
            "statistics_error": statistics_error(v["batch_stats"], reference["batch_stats"]),
            "test_accuracy": accuracy(model, v, dataset),
        }
        for n, v in candidates
    ]


def recalibrate_with(
    config: Config, model: nn.Module, dataset: Dataset, variables: Variables, count: int
) -> Variables:
    """The variables with the statistics of the first `count` of the shuffled images."""
    order = jax.random.permutation(jax.random.key(config.seed), dataset.train.labels.size)
    size = min(config.recalibration_batch, count)
    batches = (
        dataset.scaled(dataset.train.inputs[order[i : min(i + size, count)]])
        for i in range(0, count - 1, size)
    )
    return recalibrate(model, variables, batches, train=True)


def statistics_error(stats: Variables, reference: Variables) -> float:
    """Root mean square over all features of the errors of mean and standard deviation.

    In units of the standard deviation of the reference: (mean - mean') / std' and
    std / std' - 1.
    """
    flat, true = (traverse_util.flatten_dict(s) for s in (stats, reference))
    errors = []
    for *path, name in flat:
        if name != "mean":
            continue
        (m, v), (true_m, true_v) = (
            [np.asarray(tree[*path, leaf], np.float64) for leaf in ("mean", "var")]
            for tree in (flat, true)
        )
        seen = true_v > 0
        errors += [((m - true_m)[seen] / np.sqrt(true_v[seen]))]
        errors += [np.sqrt(v[seen] / true_v[seen]) - 1]
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def accuracy(model: nn.Module, variables: Variables, dataset: Dataset) -> float:
    """Of the test set, a thousand examples at a time."""
    test, chunk = dataset.test, 1000
    hits = sum(
        float(_hits(model)(variables, dataset.scaled(x), y))
        for x, y in (
            (test.inputs[i : i + chunk], test.labels[i : i + chunk])
            for i in range(0, test.labels.size, chunk)
        )
    )
    return hits / test.labels.size


@functools.cache
def _hits(model):
    return jax.jit(lambda v, x, y: correct(model.apply(v, x, train=False), y).sum())


def summarize(records: list[Measured]) -> list[dict[str, Any]]:
    """For each kind of weights and number of images the median and the range over seeds."""
    runs: dict[tuple[str, int], list[Measured]] = {}
    for r in records:
        runs.setdefault((r["weights"], r["images"]), []).append(r)

    def spread(own, name):
        values = [r[name] for r in own]
        return {"median": float(np.median(values)), "range": [min(values), max(values)]}

    return [
        {"weights": weights, "images": images}
        | {name: spread(own, name) for name in ("statistics_error", "test_accuracy")}
        for (weights, images), own in runs.items()
    ]


if __name__ == "__main__":
    flags.main(Config, "experiments.recalibration")
