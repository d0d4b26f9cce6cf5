"""What every experiment that trains arms does: train them, and leave a folder of results."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

import jax
from flax import linen as nn
from flax.linen.summary import tabulate

from bn_jax.errors import UserError
from bn_jax.lab import report, sizes, sweeps, workdir
from bn_jax.lab.arms import Arm, C, build_run, grid, in_steps, load_data
from bn_jax.lab.config import Config, Processes
from bn_jax.lab.data import Dataset
from bn_jax.lab.data.cache import default_cache_dir
from bn_jax.lab.findings import Findings
from bn_jax.lab.progress import Progress
from bn_jax.lab.report.page import write
from bn_jax.lab.report.terminal import print_summary
from bn_jax.lab.resumable import Resumable
from bn_jax.lab.statistics import ArmResult, Budget, Point, Record, Summary
from bn_jax.lab.sweeps.sweep import alike
from bn_jax.lab.training import distributed
from bn_jax.lab.training.run import Run, Swept
from bn_jax.lab.watchers import Watch, live, note
from bn_jax.xla import keep_compiled, set_up


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained of an arm: its run, at every point with every seed, so long."""

    run: Run
    points: Sequence[Point]
    seeds: Sequence[int]
    budget: Budget

    @classmethod
    def of(cls, config: Config, arm: Arm, run: Run) -> Plan:
        """What the flags ask for."""
        own = arm.config(config)
        seeds = range(config.seed, config.seed + config.seeds)
        budget = Budget(own.steps, own.eval_every, own.patience)
        return cls(run, grid(config, arm), seeds, budget)

    @property
    def count(self) -> int:
        """Of runs."""
        return len(self.points) * len(self.seeds)


@dataclasses.dataclass(frozen=True)
class Training(Generic[C]):
    """What was trained, for an experiment that shows more than the comparison.

    Attributes:
      config, dataset: of the experiment.
      runs: what trained each arm.
      records: of all runs.
      about: what `summary.json` has of the experiment.
      result: of the comparison, where arms are compared with a baseline.
      train: trains further arms as those were, seen by the same watcher; their records.
    """

    config: C
    dataset: Dataset
    runs: Mapping[str, Run]
    records: list[Record]
    about: dict[str, Any]
    result: Summary | None = None
    train: Callable[[Mapping[str, Plan]], list[Record]] = lambda plans: []

    @property
    def summary(self) -> Summary:
        """The result of the comparison."""
        assert self.result is not None, "no arms were compared"
        return self.result

    def at(self, arm: ArmResult) -> list[Record]:
        """The records of an arm at its point of the grid."""
        return arm.runs(self.records)

    def model(self, arm: str, point: Point) -> nn.Module:
        """The arm's network as it is at a point of the grid."""
        momentum = 0.0 if point.momentum is None else point.momentum
        return self.runs[arm].model(Swept(point.learning_rate, point.init_scale, momentum))


def run_experiment(
    config: C,
    arms: Mapping[str, Arm],
    *,
    experiment: str,
    question: str,
    conclude: Callable[[Training[C]], Findings],
    watch: Watch = lambda arm, evaluation: None,
    refusal: str | None = None,
    load: Callable[[C], Dataset] = load_data,
    build: Callable[[C, Arm, Dataset], Run] = build_run,
) -> dict[str, Any]:
    """Trains the arms and fills the workdir; what `summary.json` holds comes back.

    Args:
      config: of the experiment.
      arms: what is trained, by name.
      experiment, question: its name, and what the page answers.
      conclude: from what was trained to the rest of the summary, and figures.
      watch: is given every arm's `bn_jax.lab.sweeps.Evaluation`s while it trains. What it has
        in `kept`, a dict by (arm, `Point`, seed), is part of checkpoints.
      refusal: arms whose layers refuse with a message that has these words are left out;
        by default that is an error.
      load: from the flags to the dataset.
      build: from the flags, an arm and the dataset to what trains it.
    """
    start = time.perf_counter()
    started = start_jax(config, config.cache_dir)
    dataset = load(config)
    command = workdir.command(config, experiment)
    config = in_steps(config, dataset)
    runs = _build(build, config, arms, dataset, refusal)
    plans = {name: Plan.of(config, arms[name], run) for name, run in runs.items()}
    budgets = ((p.count, p.budget.steps, p.budget.eval_every) for p in plans.values())
    sizes.check_records(config, budgets)
    with workdir.entered(config, experiment) as (folder, shared):
        if (finished := workdir.finished(shared)) is not None:
            return finished
        settings = workdir.write_config(folder, config, experiment, **started, command=command)
        if config.summary:
            print_layers(runs, dataset)
        kept = getattr(watch, "kept", None)
        resumable = Resumable(shared, config.checkpoint_every, kept)
        train_arms = functools.partial(
            train, config, dataset, folder=folder, resumable=resumable, watch=watch
        )
        records = train_arms(plans)
        about = {"experiment": experiment, "question": question}
        about |= {"dataset": config.dataset, "model": config.model}
        found = conclude(Training(config, dataset, runs, records, about, train=train_arms))
        settings["seconds"] = seconds(resumable.records, time.perf_counter() - start)
        summary = about | found.to_json() | {"seconds": settings["seconds"]}
        page = write(records, summary, settings, folder, found.figures)
        print_summary(summary)
        print(page)
        return summary


def start_jax(config: Processes, cache_dir: str | None) -> dict[str, Any]:
    """JAX as experiments want it, in one process or several; what of it `config.json` says."""
    started = set_up()
    distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    keep_compiled(Path(cache_dir or default_cache_dir()).expanduser() / "compiled")
    return started


def _build(build, config, arms, dataset, refusal):
    runs = {}
    for name, arm in arms.items():
        try:
            runs[name] = build(config, arm, dataset)
        except UserError as e:
            if refusal is None or refusal not in str(e):
                raise
            print(f"{name}: refused, {e}", file=sys.stderr)
    if not runs:
        raise UserError("every arm is refused: there is nothing to train")
    return runs


def layer_table(model: nn.Module, example: jax.Array) -> str:
    """The layers, with shapes and parameter counts; nothing is computed."""
    # No colours, as the output may go to a file.
    console = {"width": 120, "force_terminal": False}
    table = tabulate(model, jax.random.key(0), depth=1, console_kwargs=console)
    return table(example, train=False).rstrip()


def print_layers(runs: Mapping[str, Run], dataset: Dataset) -> None:
    """A table of every arm's layers, and how many parameters it has."""
    example = dataset.scaled(dataset.train.inputs[:1])
    for name, run in runs.items():
        print(f"{name}:{layer_table(run.model(Swept()), example)}\n")
        trained, kept = parameter_counts(run, dataset)
        print(
            f"{name}: {trained:,} parameters, {kept:,} running statistics, "
            f"{trained + kept:,} in all\n"
        )


def parameter_counts(run: Run, dataset: Dataset) -> tuple[int, int]:
    """How many parameters are trained, and how many running statistics there are beside."""
    state = jax.eval_shape(run.init, jax.random.key(0), Swept(), dataset.train.inputs)
    trained, kept = state.train.params, state.train.batch_stats
    return jax.tree.reduce(_count, trained, 0), jax.tree.reduce(_count, kept, 0)


def _count(total, leaf):
    return total + leaf.size


def train(
    config: Config,
    dataset: Dataset,
    plans: Mapping[str, Plan],
    *,
    folder: Path,
    resumable: Resumable,
    watch: Watch,
) -> list[Record]:
    """Trains every arm; each run's record is in the file as soon as the run has ended.

    An earlier start of the same run is gone on with where its records or checkpoints end.
    """
    trained = [(plan.run, plan.budget, plan.count) for plan in plans.values()]
    parallel, records = alike(config.parallel, dataset, trained), resumable.records
    with (
        resumable.training(),
        Progress(sum(budget.steps * count for _, budget, count in trained)) as progress,
        live(folder if config.tensorboard else None) as write,
        report.rewrite_records(
            folder / "records.jsonl", [record.to_json() for record in records]
        ) as file,
    ):
        progress.advance(resumable.done(plans))
        for name, plan in resumable.rest(plans):
            progress.describe(f"{name}: {plan.count} runs")

            def see(evaluation, name=name):
                write(name, evaluation)
                watch(name, evaluation)
                per_epoch = config.eval_every if config.epochs else None
                progress.advance(evaluation.run_steps, note(evaluation, per_epoch))
                resumable.after(name, evaluation, records)

            for finished in sweeps.sweep(
                plan.run, dataset, plan.points, plan.seeds, plan.budget, arm=name,
                max_runs_at_once=config.max_runs_at_once, parallel=parallel,
                on_evaluation=see, **resumable.where(name),
            ):  # fmt: skip
                for record in finished:
                    if resumable.add(record):
                        report.append_record(file, record.to_json())
        resumable.ended(plans)
    return [record for record in records if record.arm in plans]


def seconds(records: Sequence[Record], total: float) -> dict[str, float]:
    """Where the time went, in seconds; `training` and `evaluation` are summed over runs."""
    compilation = {r.arm: r.seconds.compilation for r in records}
    return {
        "total": total,
        "compilation": sum(compilation.values()),
        "training": sum(r.seconds.training for r in records),
        "evaluation": sum(r.seconds.evaluation for r in records),
    }
