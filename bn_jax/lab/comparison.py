"""Compares arms with a baseline: steps, and seconds, to a target accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from bn_jax.lab.arms import Arm, C, chosen_arms, norm_arms
from bn_jax.lab.config import Config
from bn_jax.lab.experiment import Training, run_experiment
from bn_jax.lab.findings import Findings
from bn_jax.lab.statistics import summarize
from bn_jax.lab.watchers import Watch

__all__ = ["Config", "run"]

EXPERIMENT = "compare"


def run(
    config: C,
    *,
    experiment: str = EXPERIMENT,
    question: str | None = None,
    known: Mapping[str, Arm] | None = None,
    watch: Watch = lambda arm, evaluation: None,
    further: Callable[[Training[C]], Findings] = lambda training: Findings(),
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
    """
    question = question or default_question(config)

    def conclude(training):
        result = summarize(training.records, baseline=config.arms[0], target=config.target)
        found = further(dataclasses.replace(training, result=result))
        return dataclasses.replace(found, summary={**result.to_json(), **found.summary})

    return run_experiment(
        config, chosen_arms(config.arms, known or norm_arms()), experiment=experiment,
        question=question, conclude=conclude, watch=watch,
    )  # fmt: skip


def default_question(config: Config) -> str:
    """What the page answers."""
    names = {"bn": "BatchNorm", "layer": "LayerNorm", "group": "GroupNorm"}
    norms = " or ".join(names[arm] for arm in config.arms if arm in names)
    return f"Does {norms or 'normalisation'} make this {config.model} train faster?"
