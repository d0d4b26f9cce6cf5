"""Does normalising make this network train faster, at which learning rates, how surely?

Trains a network with and without BatchNorm (or other norms) over a grid of learning rates
and seeds, and compares the number of steps, and of seconds, to a test accuracy: each arm
at its own best learning rate, and all at the same.

By default: the network of Ioffe & Szegedy 2015, section 4.1 (three layers of 100 sigmoids,
batches of 60) on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from experiments import flags
from experiments.arms import Arm, chosen_arms, norm_arms
from experiments.conduct import Extra, Training, conduct, parameter_counts
from experiments.config import Config

__all__ = [
    "Arm",
    "Config",
    "Extra",
    "Training",
    "norm_arms",
    "parameter_counts",
    "run",
]

EXPERIMENT = "compare"


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
      extra: what the experiment shows besides, from a `Training` with the summary of the
        comparison.
    """
    question = question or default_question(config)

    def conclude(training):
        from bn_jax.measure import summarize

        summary = training.summary | summarize(
            training.records, baseline=config.arms[0], target=config.target
        )
        more = extra(dataclasses.replace(training, summary=summary))
        return Extra(summary | more.summary, more.figures)

    def write(records, summary, settings, folder, figures):
        from bn_jax import report

        report.write(records, summary, settings, folder, question, figures)
        report.print_summary(summary)

    return conduct(
        config, chosen_arms(config, known or norm_arms()), experiment=experiment,
        question=question, conclude=conclude, write=write, watch=watch,
    )  # fmt: skip


def default_question(config: Config) -> str:
    """What the page answers."""
    names = {"bn": "BatchNorm", "layer": "LayerNorm", "group": "GroupNorm"}
    norms = " or ".join(names[arm] for arm in config.arms if arm in names)
    return f"Does {norms or 'normalisation'} make this {config.model} train faster?"


if __name__ == "__main__":
    flags.main(Config, run)
