"""Does normalising make this network train faster, at which learning rates, how surely?

Trains a network with and without BatchNorm (or other norms) over a grid of learning rates
and seeds, and compares the number of steps, and of seconds, to a test accuracy: each arm
at its own best learning rate, and all at the same.

By default: the network of Ioffe & Szegedy 2015, section 4.1 (three layers of 100 sigmoids,
batches of 60) on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from bn_jax.errors import UserError
from experiments import flags, workdir
from experiments.flags import flag

EXPERIMENT = "compare"


class Arm(NamedTuple):
    """What one arm of a comparison is.

    Attributes:
      norm: layer class, a partial of one, or None.
      places: where it goes; None for those of the flag.
      momentums: of its running statistics to try; None for those of the flag, () if it has
        none.
    """

    norm: Callable[..., Any] | None
    places: tuple[str, ...] | None = None
    momentums: tuple[float, ...] | None = ()


@dataclasses.dataclass(frozen=True)
class Config:
    """Every flag of the experiment; see `python -m experiments.compare --help`."""

    dataset: str = flag(
        "digits",
        "circles, digits, or an image classification set of tensorflow-datasets by its name, "
        "such as mnist, fashion_mnist, cifar10",
    )
    model: str = flag("mlp", "mlp or cnn")
    features: tuple[int, ...] | None = flag(
        None,
        "widths of the hidden layers (mlp, by default 100,100,100), or channels of the "
        "convolutions and last the width of the dense layer (cnn, by default 16,32,64)",
    )
    activation: str = flag("sigmoid", "relu, sigmoid, tanh, elu or gelu")
    arms: tuple[str, ...] = flag(
        ("none", "bn"),
        "norms to compare, of none, bn, layer, group; the first is the baseline",
    )
    places: tuple[str, ...] = flag(
        ("before",), "where the norm goes: before or after the activation; input as well"
    )
    optimizer: str = flag("sgd", "sgd, sgd_momentum or adam")
    learning_rates: tuple[float, ...] = flag(
        (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), "learning rates to try"
    )
    init_scales: tuple[float, ...] = flag((1.0,), "factors on the initial weights to try")
    momentums: tuple[float, ...] = flag(
        (0.9,),
        "momenta of BatchNorm's running statistics to try: the weight of the old value",
    )
    seeds: int = flag(5, "how many seeds at each point of the grid")
    seed: int = flag(0, "the first seed")
    steps: int = flag(1500, "training steps of a run")
    batch_size: int = flag(60, "examples in a training step")
    eval_every: int = flag(20, "training steps between evaluations; divides steps")
    target: float | None = flag(
        None, "test accuracy to reach, in (0, 1]; by default the best that the baseline reached"
    )
    validation_fraction: float = flag(
        0.2,
        "share of the training examples held out, to choose learning rates on; 0: train on "
        "all, and choose on them",
    )
    scaling: str = flag(
        "standard", "of the input: standard (mean 0, variance 1), unit (at most 1) or raw"
    )
    max_runs_at_once: int | None = flag(
        None, "runs trained together; by default as many as fit in 2 GiB"
    )
    data_dir: str | None = flag(
        None, "of tensorflow-datasets; else TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    cache_dir: str | None = flag(None, "for decoded datasets; by default ~/.cache/bn_jax")
    workdir: str | None = flag(None, "folder for the results; by default runs/compare/<time>")
    overwrite: bool = flag(False, "delete the run that is in the workdir")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):  # as one writes in a notebook
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        for name in ("seeds", "steps", "batch_size", "eval_every", "max_runs_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}={value}: it must be at least 1")
        for name in ("learning_rates", "init_scales", "momentums", "arms", "places"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UserError(f"--{name}={_list(values)}: name one or more, each once")
        if self.features is not None and not (self.features and min(self.features) > 0):
            raise UserError(f"--features={_list(self.features)}: name widths of at least 1")
        if not 0 <= self.seed < 2**31 - self.seeds:
            raise UserError(f"--seed={self.seed}: seeds are from 0 to {2**31 - 1}")
        for name in ("learning_rates", "init_scales"):
            for value in getattr(self, name):
                if not 0 < value < math.inf:
                    raise UserError(f"--{name}: {value} must be positive and finite")
        for value in self.momentums:
            if not 0 <= value < 1:
                raise UserError(f"--momentums: {value} must be in [0, 1)")
        if self.target is not None and not 0 < self.target <= 1:
            raise UserError(f"--target={self.target}: an accuracy is in (0, 1]")
        if self.steps % self.eval_every:
            raise UserError(
                f"--eval_every={self.eval_every} does not divide --steps={self.steps}"
            )


def run(
    config: Config,
    *,
    experiment: str = EXPERIMENT,
    question: str | None = None,
    known: dict[str, Arm] | None = None,
    extra: Callable[..., Extra] | None = None,
) -> dict[str, Any]:
    """Compares, fills the workdir, prints the table; what `summary.json` holds comes back.

    Args:
      config: of this experiment or of one that rests on it.
      experiment: its name.
      question: what the page answers.
      known: the arms that there are, by the names of the flag; by default `norm_arms()`.
      extra: (config, dataset, runs, records, summary) to what the experiment shows besides.
    """
    from bn_jax.training.xla import set_flags

    start = time.perf_counter()
    xla_flags = set_flags()
    import jax
    from rich.console import Console

    from bn_jax import measure, report

    dataset = load_data(config)
    arms = chosen_arms(config, known or norm_arms())
    runs = {name: build_run(config, arm, dataset) for name, arm in arms.items()}
    folder = workdir.create(config.workdir, experiment, config.overwrite)
    devices = [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    settings = workdir.write_config(folder, config, experiment, devices, xla_flags=xla_flags)
    grids = {name: grid(config, arm) for name, arm in arms.items()}
    records = train(config, dataset, runs, grids, folder / "records.jsonl")
    summary = {
        "experiment": experiment,
        "dataset": config.dataset,
        "model": config.model,
        **measure.summarize(records, baseline=config.arms[0], target=config.target),
        "seconds": seconds(records, time.perf_counter() - start),
    }
    more = extra(config, dataset, runs, records, summary) if extra else Extra()
    settings["seconds"] = summary["seconds"]
    question = question or default_question(config)
    report.write(records, summary | more.summary, settings, folder, question, more.figures)
    console = Console()
    report.print_summary(summary, console)
    console.print()
    if "published" in more.summary:
        console.print(report.terminal_table(*report.published_rows(more.summary)))
        console.print()
    spent = ", ".join(f"{k} {v:.1f} s" for k, v in summary["seconds"].items())
    console.print(f"Time: {spent}.", soft_wrap=True, highlight=False)
    print(folder / "report.html")
    return summary | more.summary


@dataclasses.dataclass(frozen=True)
class Extra:
    """What an experiment shows besides the comparison.

    Attributes:
      summary: entries of `summary.json`; `published` among them, rows of `quantity`, `here`,
        `source` (text or None), is shown as a table.
      figures: (name, caption, matplotlib figure).
    """

    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    figures: tuple[tuple[str, str, Any], ...] = ()


def default_question(config: Config) -> str:
    """What the page answers."""
    names = {"bn": "BatchNorm", "layer": "LayerNorm", "group": "GroupNorm"}
    norms = " or ".join(names[arm] for arm in config.arms if arm in names)
    return f"Does {norms or 'normalisation'} make this {config.model} train faster?"


def norm_arms() -> dict[str, Arm]:
    """The norms of `bn_jax.models`."""
    from bn_jax import models

    return {
        name: Arm(norm, momentums=None if name == "bn" else ())
        for name, norm in models.NORMS.items()
    }


def chosen_arms(config: Config, known: dict[str, Arm]) -> dict[str, Arm]:
    """Those of the flag, in its order."""
    for name in config.arms:
        if name not in known:
            raise UserError(f"--arms: unknown {name!r}, choose from {', '.join(known)}")
    return {name: known[name] for name in config.arms}


def load_data(config: Config) -> Any:
    """The dataset, checked against the batch size."""
    from bn_jax.data import load

    dataset = load(
        config.dataset,
        validation_fraction=config.validation_fraction,
        scaling=config.scaling,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        say=lambda text: print(text, file=sys.stderr),
    )
    examples = dataset.train.labels.size
    if config.batch_size > examples:
        raise UserError(
            f"--batch_size={config.batch_size} is more than the {examples} training examples "
            f"of {config.dataset} (validation examples apart)"
        )
    return dataset


def build_run(config: Config, arm: Arm, dataset: Any) -> Any:
    """One arm as a `bn_jax.training.run.Run`."""
    import functools

    import jax

    from bn_jax import models
    from bn_jax.data import batch_indices
    from bn_jax.training.optimizers import OPTIMIZERS
    from bn_jax.training.run import Run, Swept

    families = {"mlp": (models.MLP, (100, 100, 100)), "cnn": (models.CNN, (16, 32, 64))}
    for name, value, known in (
        ("model", config.model, families),
        ("activation", config.activation, models.ACTIVATIONS),
        ("optimizer", config.optimizer, OPTIMIZERS),
        *(("places", place, models.PLACES) for place in config.places),
    ):
        if value not in known:
            raise UserError(f"--{name}: unknown {value!r}, choose from {', '.join(known)}")
    family, features = families[config.model]
    features = config.features or features

    def model(swept):
        has_momentum = arm.norm is not None and arm.momentums != ()
        momentum = {"momentum": swept.momentum} if has_momentum else {}
        return family(
            features=features,
            num_outputs=1 if dataset.num_classes == 2 else dataset.num_classes,
            norm=functools.partial(arm.norm, **momentum) if momentum else arm.norm,
            places=config.places if arm.places is None else arm.places,
            activation=config.activation,
        )

    def batches(key, first_step, num_steps):
        examples = dataset.train.labels.size
        return batch_indices(key, first_step, num_steps, examples, config.batch_size)

    run = Run(model, OPTIMIZERS[config.optimizer], dataset.scaled, batches)
    try:
        jax.eval_shape(run.init, jax.random.key(0), Swept(1.0, 1.0, 0.5), dataset.train.inputs)
    except ValueError as e:
        raise UserError(f"--model={config.model} --features={_list(features)}: {e}") from e
    return run


def train(
    config: Config, dataset: Any, runs: dict[str, Any], grids: dict[str, list], path: Any
) -> list[dict]:
    """Trains every arm; each run's record is in the file as soon as the run has ended."""
    from bn_jax import measure, report
    from experiments.progress import Progress

    seeds = range(config.seed, config.seed + config.seeds)
    total = sum(map(len, grids.values())) * config.seeds * config.steps
    budget = measure.Budget(config.steps, config.eval_every)
    records = []
    with Progress(total) as progress, report.open_records(path) as file:
        for arm, points in grids.items():
            progress.describe(f"{arm}: {len(points) * config.seeds} runs")
            for finished in measure.sweep(
                runs[arm], dataset, points, seeds, budget,
                max_runs_at_once=config.max_runs_at_once, on_progress=progress.advance,
            ):  # fmt: skip
                for record in finished:
                    records.append({"arm": arm, **record})
                    report.append_record(file, records[-1])
    return records


def grid(config: Config, arm: Arm) -> list[Any]:
    """The points of an arm; only running statistics have a momentum to vary."""
    from bn_jax.measure import Point

    momentums = config.momentums if arm.momentums is None else arm.momentums or (None,)
    axes = (config.learning_rates, config.init_scales, momentums)
    return [Point(*values) for values in itertools.product(*axes)]


def seconds(records: list[dict], total: float) -> dict[str, float]:
    """Where the time went, in seconds; `training` and `evaluation` are summed over runs."""
    compilation = {r["arm"]: r["seconds"]["compilation"] for r in records}
    return {
        "total": total,
        "compilation": sum(compilation.values()),
        **{k: sum(r["seconds"][k] for r in records) for k in ("training", "evaluation")},
    }


def _list(values):
    return ",".join(map(str, values))


if __name__ == "__main__":
    flags.main(Config, run)
