"""Does normalising make this network train faster, at which learning rates, how surely?

Trains a network with and without BatchNorm (or other norms) over a grid of learning rates
and seeds, and compares the number of steps, and of seconds, to a test accuracy: each arm
at its own best learning rate, and all at the same.

By default: the network of Ioffe & Szegedy 2015, section 4.1 (three layers of 100 sigmoids,
batches of 60) on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import flags, workdir
from experiments.arms import (
    Arm,
    build_run,
    chosen_arms,
    grid,
    in_steps,
    load_data,
    norm_arms,
)
from experiments.config import Config

__all__ = ["Arm", "Config", "Extra", "Training", "norm_arms", "run"]

EXPERIMENT = "compare"


@dataclasses.dataclass(frozen=True)
class Training:
    """What was trained, for an experiment that shows more than the comparison.

    Attributes:
      config, dataset: of the experiment.
      runs: a `bn_jax.training.run.Run` by arm.
      records: of all runs.
      summary: of the comparison.
    """

    config: Config
    dataset: Any
    runs: Mapping[str, Any]
    records: list[dict]
    summary: dict[str, Any]


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


def run(
    config: Config,
    *,
    experiment: str = EXPERIMENT,
    question: str | None = None,
    known: Mapping[str, Arm] | None = None,
    watch: Callable[[str, Any], None] = lambda arm, evaluation: None,
    extra: Callable[[Training], Extra] = lambda training: Extra(),
) -> dict[str, Any]:
    """Compares, fills the workdir, prints the table; what `summary.json` holds comes back.

    Args:
      config: of this experiment or of one that rests on it.
      experiment: its name.
      question: what the page answers.
      known: the arms that there are, by the names of the flag; by default `norm_arms()`.
      watch: is given every arm's `bn_jax.measure.Evaluation`s while it trains.
      extra: what the experiment shows besides.
    """
    from bn_jax.training.xla import set_flags

    start = time.perf_counter()
    xla_flags = set_flags()
    import jax

    from bn_jax import measure, report

    dataset = load_data(config)
    command = workdir.command(config, experiment)
    config = in_steps(config, dataset)
    arms = chosen_arms(config, known or norm_arms())
    runs = {name: build_run(config, arm, dataset) for name, arm in arms.items()}
    folder = workdir.create(config.workdir, experiment, config.overwrite)
    devices = [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    settings = workdir.write_config(
        folder, config, experiment, devices, xla_flags=xla_flags, command=command
    )
    if config.summary:
        print_layers(runs, dataset)
    records = train(config, dataset, runs, arms, folder, watch)
    question = question or default_question(config)
    summary = {
        "experiment": experiment,
        "question": question,
        "dataset": config.dataset,
        "model": config.model,
        **measure.summarize(records, baseline=config.arms[0], target=config.target),
    }
    more = extra(Training(config, dataset, runs, records, summary))
    settings["seconds"] = seconds(records, time.perf_counter() - start)
    summary |= {"seconds": settings["seconds"]} | more.summary
    report.write(records, summary, settings, folder, question, more.figures)
    report.print_summary(summary)
    print(folder / "report.html")
    return summary


def default_question(config: Config) -> str:
    """What the page answers."""
    names = {"bn": "BatchNorm", "layer": "LayerNorm", "group": "GroupNorm"}
    norms = " or ".join(names[arm] for arm in config.arms if arm in names)
    return f"Does {norms or 'normalisation'} make this {config.model} train faster?"


def print_layers(runs: Mapping[str, Any], dataset: Any) -> None:
    """A table of every arm's layers, with shapes and parameter counts."""
    import jax
    from flax import linen as nn

    from bn_jax.training.run import Swept

    # No colours, as the output may go to a file.
    console = {"width": 120, "force_terminal": False}
    example = dataset.scaled(dataset.train.inputs[:1])
    for name, run in runs.items():
        model = run.model(Swept(1.0, 1.0, 0.5))
        table = nn.tabulate(model, jax.random.key(0), depth=1, console_kwargs=console)
        print(f"{name}:{table(example, train=False).rstrip()}\n")
        trained, kept = parameter_counts(run, dataset)
        print(
            f"{name}: {trained:,} parameters, {kept:,} running statistics, "
            f"{trained + kept:,} in all\n"
        )


def parameter_counts(run: Any, dataset: Any) -> tuple[int, int]:
    """How many parameters are trained, and how many running statistics there are beside."""
    import jax

    from bn_jax.training.run import Swept

    state = jax.eval_shape(
        run.init, jax.random.key(0), Swept(1.0, 1.0, 0.5), dataset.train.inputs
    )
    return tuple(
        sum(v.size for v in jax.tree.leaves(part))
        for part in (state.train.params, state.train.batch_stats)
    )


def train(
    config: Config,
    dataset: Any,
    runs: Mapping[str, Any],
    arms: Mapping[str, Arm],
    folder: Path,
    watch: Callable[[str, Any], None],
) -> list[dict]:
    """Trains every arm; each run's record is in the file as soon as the run has ended."""
    from bn_jax import measure, report
    from experiments.progress import Progress
    from experiments.watchers import live, note

    grids = {name: grid(config, arm) for name, arm in arms.items()}
    budgets = {
        name: measure.Budget(own.steps, own.eval_every, own.patience)
        for name, own in ((name, arm.config(config)) for name, arm in arms.items())
    }
    seeds = range(config.seed, config.seed + config.seeds)
    total = config.seeds * sum(len(grids[name]) * budgets[name].steps for name in arms)
    records = []
    with (
        Progress(total) as progress,
        live(folder if config.tensorboard else None) as write,
        report.open_records(folder / "records.jsonl") as file,
    ):
        for name, points in grids.items():
            progress.describe(f"{name}: {len(points) * config.seeds} runs")

            def see(evaluation, name=name):
                write(name, evaluation)
                watch(name, evaluation)
                per_epoch = config.eval_every if config.epochs else None
                progress.advance(evaluation.run_steps, note(evaluation, per_epoch))

            for finished in measure.sweep(
                runs[name], dataset, points, seeds, budgets[name],
                max_runs_at_once=config.max_runs_at_once, on_evaluation=see,
            ):  # fmt: skip
                for record in finished:
                    records.append({"arm": name, **record})
                    report.append_record(file, records[-1])
    return records


def seconds(records: list[dict], total: float) -> dict[str, float]:
    """Where the time went, in seconds; `training` and `evaluation` are summed over runs."""
    compilation = {r["arm"]: r["seconds"]["compilation"] for r in records}
    return {
        "total": total,
        "compilation": sum(compilation.values()),
        **{k: sum(r["seconds"][k] for r in records) for k in ("training", "evaluation")},
    }


if __name__ == "__main__":
    flags.main(Config, run)
