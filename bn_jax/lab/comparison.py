"""Compares arms with a baseline: steps, and seconds, to a target."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from bn_jax.errors import UserError
from bn_jax.lab import own
from bn_jax.lab.arms import Arm, C, build_run, chosen_arms, load_data, norm_arms
from bn_jax.lab.config import Config
from bn_jax.lab.experiment import Training, run_experiment
from bn_jax.lab.findings import Findings
from bn_jax.lab.own import NOTHING, Given
from bn_jax.lab.result import Comparison
from bn_jax.lab.statistics import summarize
from bn_jax.lab.watchers import Watch
from bn_jax.lab.workdir import new_folder

__all__ = ["Config", "compare", "run"]

EXPERIMENT = "compare"
# Ways to train in which the devices share a batch, and with it the statistics of BatchNorms.
SHARING = ("pmap", "jit", "shard_map")


def compare(
    model: Any = "mlp",
    data: Any = "digits",
    *,
    optimizer: Any = "sgd",
    loss: Any = None,
    metric: Any = None,
    **flags: Any,
) -> Comparison:
    """Trains a model with several norms, and compares how soon each reaches a target.

        result = compare(MyNet, {"x_train": x, "y_train": y}, arms=("none", "bn", "group"))

    Args:
      model: a name of `bn_jax.lab.models`; or a Linen or NNX model, its class, or a function
        of the number of outputs that makes one. Its BatchNorms are replaced by the norm of
        each arm (`bn_jax.surgery.swap`), its source is untouched.
      data: a name, an `.npz` file, arrays or a function that returns them; see
        `bn_jax.lab.data.load`.
      optimizer: a name, an alias of optax with options as in "adamw(weight_decay=0.05)", or
        a function from a learning rate to an optax transformation.
      loss: "cross_entropy", "squared_error", or a function (outputs, labels) -> `[n]`; by
        default as the labels are.
      metric: "accuracy", "r2", or such a function, better if higher. The target is one of it.
      **flags: the other flags of `python -m bn_jax.lab --help`: `arms`, `learning_rates`,
        `seeds`, `steps`, `batch_size`, `eval_every`, `target`, `workdir`, ...

    Raises:
      UserError: in one line, what does not fit.
    """
    values = {"model": model, "data": data, "optimizer": optimizer}
    values |= {"loss": loss, "metric": metric}
    given = Given(**{k: None if isinstance(v, str) else v for k, v in values.items()})
    names = {k: v if v is None else own.shown(v) for k, v in values.items() if k != "data"}
    folder = flags.pop("workdir", None) or new_folder(Path("runs") / EXPERIMENT)
    config = Config(dataset=own.shown(data), **names, **flags, workdir=str(folder))
    run(config, given=given)
    return Comparison.load(folder)


def run(
    config: C,
    *,
    experiment: str = EXPERIMENT,
    question: str | None = None,
    known: Mapping[str, Arm] | None = None,
    watch: Watch = lambda arm, evaluation: None,
    further: Callable[[Training[C]], Findings] = lambda training: Findings(),
    given: Given = NOTHING,
) -> dict[str, Any]:
    """Compares, fills the workdir, prints the table; what `summary.json` holds comes back.

    Args:
      config: of this experiment or of one that rests on it.
      experiment: its name.
      question: what the page answers.
      known: the arms that there are, by the names of the flag; by default `norm_arms()`.
      watch: is given every arm's `bn_jax.lab.sweeps.Evaluation`s while it trains.
      further: what the experiment finds besides, from a `Training` with the summary of the
        comparison.
      given: objects in place of flags.
    """
    question = question or default_question(config)
    has_own_model = own.has_own_model(config, given)
    if has_own_model:
        config = _for_own_model(config)

    def load(config):
        dataset = load_data(config, given)
        if has_own_model:
            own.say(own.describe(config, dataset, given))
        return dataset

    def conclude(training):
        result = summarize(training.records, baseline=config.arms[0], target=config.target)
        found = further(dataclasses.replace(training, result=result))
        measure = own.measure(config, training.dataset, given)
        named = {} if measure == "accuracy" else {"measure": measure}
        summary = {**result.to_json(), **named, **found.summary}
        return dataclasses.replace(found, summary=summary)

    return run_experiment(
        config, chosen_arms(config.arms, known or norm_arms(has_own_model)),
        experiment=experiment, question=question, conclude=conclude, watch=watch, load=load,
        build=functools.partial(build_run, given=given),
    )  # fmt: skip


def _for_own_model(config: C) -> C:
    """The flags, with a way to train that does not want BatchNorms of ours."""
    if config.summary:
        raise UserError("--summary: it is of the networks that are built in")
    if config.parallel in SHARING:
        raise UserError(
            f"--parallel={config.parallel}: the BatchNorms of --model={config.model} would not "
            "share their statistics over devices; choose grid or single"
        )
    if config.parallel == "auto" and jax.device_count() > 1:
        return dataclasses.replace(config, parallel="grid")
    return config


def default_question(config: Config) -> str:
    """What the page answers."""
    names = {"bn": "BatchNorm", "layer": "LayerNorm", "group": "GroupNorm"}
    norms = " or ".join(names[arm] for arm in config.arms if arm in names)
    return f"Does {norms or 'normalisation'} make this {config.model} train faster?"
