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
from typing import Any, ClassVar

from bn_jax.errors import UserError
from experiments import arms, compare, flags, workdir
from experiments.flags import flag

EXPERIMENT = "recalibration"
QUESTION = "How many images do population statistics need?"
WEIGHTS = ("last", "average")
AVERAGE_EVERY = 10  # steps


@dataclasses.dataclass(frozen=True)
class Config(flags.Quick):
    """Every flag of the experiment; see `python -m experiments.recalibration --help`."""

    QUICK: ClassVar = {
        "dataset": "digits", "seeds": 2, "steps": 100, "images": (30, 100, 300)
    }  # fmt: skip

    dataset: str = flag("cifar10", "as in experiments.compare")
    model: str = flag("cnn", "cnn or mlp")
    features: tuple[int, ...] | None = flag(None, "as in experiments.compare")
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu")
    optimizer: str = flag("sgd", "as in experiments.compare")
    learning_rate: float = flag(0.1, "learning rate")
    momentum: float = flag(0.99, "of the running statistics: the weight of the old value")
    steps: int = flag(1000, "training steps")
    batch_size: int = flag(60, "examples in a training step")
    seeds: int = flag(3, "how many networks")
    seed: int = flag(0, "the first seed")
    images: tuple[int, ...] = flag(
        (30, 100, 300, 1000, 3000, 10000), "how many training images to recalibrate with"
    )
    recalibration_batch: int = flag(
        500, "images that are normalised together while recalibrating"
    )
    quick: bool = flag(False, "digits, two seeds, 100 steps: a look in half a minute")
    parallel: str = flag(
        "auto", "how several devices train a network: single, pmap, jit, shard_map or auto"
    )
    data_dir: str | None = flag(None, "as in experiments.compare")
    cache_dir: str | None = flag(None, "as in experiments.compare")
    workdir: str | None = flag(
        None, "folder for the results; by default runs/recalibration/<time>"
    )
    overwrite: bool = flag(False, "delete the run that is in the workdir")

    def __post_init__(self):
        self.apply_quick()
        if not self.images or min(self.images) < 2 or sorted(self.images) != [*self.images]:
            raise UserError(
                f"--images={self.images}: name counts of 2 or more, in ascending order"
            )
        if self.recalibration_batch < 2:
            raise UserError(f"--recalibration_batch={self.recalibration_batch}: at least 2")
        if self.steps < 2:
            raise UserError(
                f"--steps={self.steps}: the last half of them is averaged: at least 2"
            )

    def comparison(self) -> compare.Config:
        """The training of one arm, as `experiments.compare` would do it."""
        named = {f.name for f in dataclasses.fields(compare.Config)}
        same = {k: v for k, v in dataclasses.asdict(self).items() if k in named}
        return compare.Config(
            **same, arms=("bn",), eval_every=self.steps,
            learning_rates=(self.learning_rate,), momentums=(self.momentum,),
        )  # fmt: skip


def run(config: Config) -> dict[str, Any]:
    """Measures, fills the workdir, prints the table; what `summary.json` holds comes back."""
    from bn_jax.training.xla import set_up

    started = set_up()
    import jax

    from bn_jax.report import recalibration as pages

    training = config.comparison()
    dataset = arms.load_data(training)
    available = dataset.train.labels.size
    if max(config.images) > available:
        raise UserError(
            f"--images={max(config.images)}: {config.dataset} has {available} training images"
        )
    one = arms.build_run(training, arms.norm_arms()["bn"], dataset)
    folder = workdir.create(config.workdir, EXPERIMENT, config.overwrite)
    devices = [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    settings = workdir.write_config(folder, config, EXPERIMENT, devices, **started)
    records = measure(config, one, dataset, folder / "records.jsonl")
    summary = {
        "experiment": EXPERIMENT, "dataset": config.dataset, "model": config.model,
        "training_images": available, "seeds": config.seeds, "arms": summarize(records),
    }  # fmt: skip
    pages.write(summary, settings, folder, QUESTION)
    return summary


def measure(config: Config, one: Any, dataset: Any, path: Path) -> list[dict]:
    """A record for every network, kind of weights and number of images, in the file at once."""
    from bn_jax import report
    from experiments.progress import Progress

    seeds = range(config.seed, config.seed + config.seeds)
    records = []
    with Progress(config.seeds) as progress, report.open_records(path) as file:
        for seed in seeds:
            progress.describe(f"seed {seed}")
            of_run = trained(config, one, dataset, seed)
            for weights, variables in zip(WEIGHTS, of_run, strict=True):
                for found in recalibrated(config, one, dataset, variables):
                    records.append({"seed": seed, "weights": weights, **found})
                    report.append_record(file, records[-1])
            progress.advance(1)
    return records


def trained(config: Config, one: Any, dataset: Any, seed: int) -> tuple[Any, Any]:
    """The variables after training, and those with the average weights."""
    import jax

    from bn_jax.measure import Budget, Point
    from experiments.single import train_one

    mean, last, count = None, None, 0

    @jax.jit
    def averaged(mean, new, k):
        return jax.tree.map(lambda m, p: m + (p - m) / k, mean, new)

    def see(step, state):
        nonlocal mean, last, count
        last = {"params": state.train.params, "batch_stats": state.train.batch_stats}
        if step > config.steps // 2:
            count += 1
            mean = averaged(mean or last["params"], last["params"], count)

    point = Point(config.learning_rate, 1.0, config.momentum)
    budget = Budget(config.steps, math.gcd(config.steps, AVERAGE_EVERY))
    train_one(one, dataset, point, seed, budget, see, parallel=config.parallel)
    return last, {**last, "params": mean}


def recalibrated(config: Config, one: Any, dataset: Any, variables: Any) -> list[dict]:
    """Error and accuracy with running statistics (images 0) and with those of more images."""
    from bn_jax.training.run import Swept

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


def recalibrate_with(config, model, dataset, variables, count: int) -> Any:
    """The variables with the statistics of the first `count` of the shuffled images."""
    import jax

    from bn_jax.surgery import recalibrate

    order = jax.random.permutation(jax.random.key(config.seed), dataset.train.labels.size)
    size = min(config.recalibration_batch, count)
    batches = (
        dataset.scaled(dataset.train.inputs[order[i : min(i + size, count)]])
        for i in range(0, count - 1, size)
    )
    return recalibrate(model, variables, batches, train=True)


def statistics_error(stats: Any, reference: Any) -> float:
    """Root mean square over all features of the errors of mean and standard deviation.

    In units of the standard deviation of the reference: (mean - mean') / std' and
    std / std' - 1.
    """
    import numpy as np
    from flax import traverse_util

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


def accuracy(model: Any, variables: Any, dataset: Any) -> float:
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
    import jax

    from bn_jax.training.metrics import correct

    return jax.jit(lambda v, x, y: correct(model.apply(v, x, train=False), y).sum())


def summarize(records: list[dict]) -> list[dict]:
    """For each kind of weights and number of images the median and the range over seeds."""
    import numpy as np

    arms = dict.fromkeys((r["weights"], r["images"]) for r in records)

    def spread(found, name):
        values = [r[name] for r in found]
        return {"median": float(np.median(values)), "range": [min(values), max(values)]}

    return [
        {"weights": weights, "images": images}
        | {name: spread(found, name) for name in ("statistics_error", "test_accuracy")}
        for weights, images in arms
        if (found := [r for r in records if (r["weights"], r["images"]) == (weights, images)])
    ]


if __name__ == "__main__":
    flags.main(Config, run)
