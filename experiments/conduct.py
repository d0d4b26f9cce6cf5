"""What every experiment that trains arms does: train them, and leave a folder of results."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bn_jax.errors import UserError
from experiments import workdir
from experiments.arms import Arm, build_run, grid, in_steps, load_data
from experiments.config import Config


class Plan(NamedTuple):
    """What is trained of an arm: its run, at every point with every seed, so long."""

    run: Any
    points: Sequence[Any]
    seeds: Sequence[int]
    budget: Any

    @classmethod
    def of(cls, config: Config, arm: Arm, run: Any) -> Plan:
        """What the flags ask for."""
        from bn_jax.measure import Budget

        own = arm.config(config)
        seeds = range(config.seed, config.seed + config.seeds)
        budget = Budget(own.steps, own.eval_every, own.patience)
        return cls(run, grid(config, arm), seeds, budget)

    @property
    def count(self) -> int:
        """Of runs."""
        return len(self.points) * len(self.seeds)


@dataclasses.dataclass(frozen=True)
class Training:
    """What was trained, for an experiment that shows more than the comparison.

    Attributes:
      config, dataset: of the experiment.
      runs: a `bn_jax.training.run.Run` by arm.
      records: of all runs.
      summary: what `summary.json` has of it so far.
      train: trains further arms as those were, seen by the same watcher; their records.
    """

    config: Config
    dataset: Any
    runs: Mapping[str, Any]
    records: list[dict]
    summary: dict[str, Any]
    train: Callable[[Mapping[str, Plan]], list[dict]] = lambda plans: []


@dataclasses.dataclass(frozen=True)
class Extra:
    """What an experiment concludes.

    Attributes:
      summary: entries of `summary.json`. Shown as tables are `published`, rows of `quantity`,
        `here`, `source` (text or None), `agrees` (bool or None) and perhaps `reason`, and of
        experiments without a baseline `tables`, each `title`, `header`, `rows`.
      figures: (name, caption, matplotlib figure).
    """

    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    figures: tuple[tuple[str, str, Any], ...] = ()


def conduct(
    config: Config,
    arms: Mapping[str, Arm],
    *,
    experiment: str,
    question: str,
    conclude: Callable[[Training], Extra],
    write: Callable[..., None] | None = None,
    watch: Callable[[str, Any], None] = lambda arm, evaluation: None,
    refusal: str | None = None,
    load: Callable[[Config], Any] = load_data,
    build: Callable[[Config, Arm, Any], Any] = build_run,
) -> dict[str, Any]:
    """Trains the arms and fills the workdir; what `summary.json` holds comes back.

    Args:
      config: of the experiment.
      arms: what is trained, by name.
      experiment, question: its name, and what the page answers.
      conclude: from what was trained to the rest of the summary, and figures.
      write: (records, summary, settings, folder, figures): leaves the page, prints the
        tables; by default those of the summary's `tables` and `published`.
      watch: is given every arm's `bn_jax.measure.Evaluation`s while it trains. What it has
        in `kept`, a dict by (arm, `Point`, seed), is part of checkpoints.
      refusal: arms whose layers refuse with a message that has these words are left out;
        by default that is an error.
      load: from the flags to the dataset.
      build: from the flags, an arm and the dataset to its `bn_jax.training.run.Run`.
    """
    start = time.perf_counter()
    started = start_jax(config)
    import jax

    from experiments.survival import Survival

    dataset = load(config)
    command = workdir.command(config, experiment)
    config = in_steps(config, dataset)
    runs = _build(build, config, arms, dataset, refusal)
    with workdir.entered(config, experiment) as (folder, shared):
        if (finished := workdir.finished(shared)) is not None:
            return finished
        devices = [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
        settings = workdir.write_config(
            folder, config, experiment, devices, **started, command=command
        )
        if config.summary:
            print_layers(runs, dataset)
        kept = getattr(watch, "kept", {})
        survival = Survival(shared / "checkpoints", config.checkpoint_every, kept)
        train_arms = functools.partial(
            train, config, dataset, folder=folder, survival=survival, watch=watch
        )
        plans = {name: Plan.of(config, arms[name], run) for name, run in runs.items()}
        records = train_arms(plans)
        about = {"experiment": experiment, "question": question}
        about |= {"dataset": config.dataset, "model": config.model}
        found = conclude(Training(config, dataset, runs, records, about, train_arms))
        settings["seconds"] = seconds(survival.records, time.perf_counter() - start)
        summary = about | found.summary | {"seconds": settings["seconds"]}
        (write or write_tables)(records, summary, settings, folder, found.figures)
        print(folder / "report.html")
        return summary


def start_jax(config: Any) -> dict[str, Any]:
    """JAX as experiments want it, in one process or several; what of it `config.json` says."""
    from bn_jax.data.cache import default_cache_dir
    from bn_jax.training import distributed
    from bn_jax.training.xla import keep_compiled, set_up

    started = set_up()
    distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    keep_compiled(Path(config.cache_dir or default_cache_dir()).expanduser() / "compiled")
    return started


def write_tables(_: Any, summary: dict, settings: dict, folder: Path, figures: Any) -> None:
    """Leaves the page of an experiment without a baseline, and prints its tables."""
    from bn_jax.report import crossed

    crossed.write(summary, settings, folder, figures)
    crossed.print_summary(summary)


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


def print_layers(runs: Mapping[str, Any], dataset: Any) -> None:
    """A table of every arm's layers, with shapes and parameter counts."""
    import jax
    from flax import linen as nn

    from bn_jax.training.run import Swept

    # No colours, as the output may go to a file.
    console = {"width": 120, "force_terminal": False}
    example = dataset.scaled(dataset.train.inputs[:1])
    for name, run in runs.items():
        model = run.model(Swept())
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

    state = jax.eval_shape(run.init, jax.random.key(0), Swept(), dataset.train.inputs)
    return tuple(
        sum(v.size for v in jax.tree.leaves(part))
        for part in (state.train.params, state.train.batch_stats)
    )


def train(
    config: Config,
    dataset: Any,
    plans: Mapping[str, Plan],
    *,
    folder: Path,
    survival: Any,
    watch: Callable[[str, Any], None],
) -> list[dict]:
    """Trains every arm; each run's record is in the file as soon as the run has ended.

    An earlier start of the same run is gone on with where its last checkpoint was.
    """
    from bn_jax import measure, report
    from bn_jax.measure.sweep import alike
    from experiments.progress import Progress
    from experiments.watchers import live, note

    trained = [(plan.run, plan.budget, plan.count) for plan in plans.values()]
    total = sum(budget.steps * count for _, budget, count in trained)
    parallel, records = alike(config.parallel, dataset, trained), survival.records
    with (
        survival.training(),
        Progress(total) as progress,
        live(folder if config.tensorboard else None) as write,
        report.rewrite_records(folder / "records.jsonl", records) as file,
    ):
        progress.advance(survival.done(total))
        for name, plan in survival.rest(plans):
            progress.describe(f"{name}: {plan.count} runs")

            def see(evaluation, name=name):
                write(name, evaluation)
                watch(name, evaluation)
                per_epoch = config.eval_every if config.epochs else None
                progress.advance(evaluation.run_steps, note(evaluation, per_epoch))
                survival.after(name, evaluation, records)

            for finished in measure.sweep(
                plan.run, dataset, plan.points, plan.seeds, plan.budget,
                max_runs_at_once=config.max_runs_at_once, parallel=parallel,
                on_evaluation=see, **survival.where(name),
            ):  # fmt: skip
                for record in finished:
                    records.append({"arm": name, **record})
                    report.append_record(file, records[-1])
    return [record for record in records if record["arm"] in plans]


def seconds(records: list[dict], total: float) -> dict[str, float]:
    """Where the time went, in seconds; `training` and `evaluation` are summed over runs."""
    compilation = {r["arm"]: r["seconds"]["compilation"] for r in records}
    return {
        "total": total,
        "compilation": sum(compilation.values()),
        **{k: sum(r["seconds"][k] for r in records) for k in ("training", "evaluation")},
    }
