"""Does BatchNorm make dropout obsolete? BatchNorm x dropout x L2 on a small training set.

Three layers of 100 ReLUs on 500 images of MNIST, trained until they are all right: the test
accuracy, and the gap between the accuracy on the training set and on the test set, both at
the last step with the running statistics and without dropout. Every combination has the
learning rate that is best on a validation set, which is not trained on. Differences are
between runs of one seed, medians over the seeds with 95 % intervals (percentile bootstrap).

The claims are those of Ioffe & Szegedy 2015: BatchNorm regularises (section 3.4), and dropout
can be removed without more overfitting (section 4.2.1). The paper has no numbers for either.
Where dropout is of no use without BatchNorm, its removal with BatchNorm shows nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import fixed, flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    from bn_jax.lab import crossed
    from bn_jax.lab.arms import Arm, chosen_arms, norm_arms
    from bn_jax.lab.experiment import Training, run_experiment
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.report.plotting import add_legend, arm_styles, new_figure, tidy
    from bn_jax.lab.report.tables import Table
    from bn_jax.lab.report.text import number
    from bn_jax.lab.statistics import Record
    from bn_jax.lab.statistics.convergence import Estimate, estimate
    from bn_jax.lab.watchers import Weights
if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIMENT = "regularisation"
QUESTION = "Does BatchNorm make dropout obsolete on a small training set?"
OBSOLETE = "dropout can be removed without more overfitting (Ioffe & Szegedy 2015, 4.2.1)"
# By whether dropout helps without BatchNorm, and with it.
NOTHING = "nothing to make obsolete, dropout does not clearly help without BatchNorm or with it"
ANSWERS = {
    (True, False): "yes, dropout clearly helps without BatchNorm and not with it",
    (True, True): "no, dropout clearly helps with BatchNorm too",
    (False, True): "no, dropout clearly helps with BatchNorm and not without it",
    (False, False): NOTHING,
}
REGULARISES = "BatchNorm regularises (Ioffe & Szegedy 2015, 3.4)"
CAPTION = (
    "Test accuracy, and by how much the accuracy on the training set is higher. A column for "
    "every weight of the L2 penalty. Medians over the seeds with 95 % intervals, at the "
    "learning rate that is best on the validation set. Norms are moved a little sideways so "
    "that they do not hide each other."
)
PANELS = {"test": "test accuracy (%)", "gap": "training - test (%)"}


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.regularisation --help`."""

    QUICK: ClassVar = {
        "dataset": "digits", "train_examples": 200, "dropouts": (0.0, 0.3), "l2s": (0.0, 0.01),
        "steps": 300, "learning_rates": (0.1,),
    }  # fmt: skip

    dropouts: tuple[float, ...] = flag(
        (0.0, 0.2, 0.5), "shares of the units to drop", at_least=0, below=1, each_once=True
    )
    l2s: tuple[float, ...] = flag(
        (0.0, 0.001, 0.01), "weights of the L2 penalty", at_least=0, each_once=True
    )
    dropout: float | None = fixed(None)  # every arm's own, as is l2
    l2: float = fixed(0.0)
    dataset: str = flag("mnist")
    train_examples: int | None = flag(500, "train on so many, chosen at random")
    validation_fraction: float = flag(0.02, "of all examples, to choose learning rates on")
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu")
    learning_rates: tuple[float, ...] = flag((0.1, 0.3, 1.0))
    seeds: int = flag(10)
    steps: int = flag(600)
    batch_size: int = flag(50)
    eval_every: int = flag(300)


class Cell(NamedTuple):
    """One combination."""

    norm: str
    dropout: float
    l2: float

    @property
    def name(self) -> str:
        """As an arm."""
        return f"{self.norm}, dropout {self.dropout:g}, L2 {self.l2:g}"


def run(config: Config) -> dict[str, Any]:
    """Trains, fills the workdir, prints the tables; the summary comes back."""
    weights = Weights()
    return run_experiment(
        config, arms(config), experiment=EXPERIMENT, question=QUESTION, watch=weights,
        conclude=lambda training: conclude(training, weights.kept),
    )  # fmt: skip


def cells(config: Config) -> list[Cell]:
    """All combinations."""
    product = itertools.product(config.arms, config.l2s, config.dropouts)
    return [Cell(norm, dropout, l2) for norm, l2, dropout in product]


def arms(config: Config) -> dict[str, Arm]:
    """Every combination, by its name."""
    norms = chosen_arms(config.arms, norm_arms())
    return {
        c.name: norms[c.norm]._replace(changes={"dropout": c.dropout, "l2": c.l2})
        for c in cells(config)
    }


def conclude(training: Training[Config], weights: dict) -> Findings:
    """Accuracies and gaps of every combination, their differences, and the claims."""
    measured = measure(training, weights)
    combinations = [own.to_json() for own in measured.values()]
    return Findings(
        {"budget_steps": training.config.steps, "combinations": combinations},
        [table(measured.values())],
        [*rows(training.config, measured)],
        [("accuracy_and_gap.png", CAPTION, accuracy_and_gap(measured))],
    )


class Measured(NamedTuple):
    """A combination at its best rate, by seed."""

    cell: Cell
    learning_rate: float
    validation: list[float]
    test: list[float]
    gap: list[float]
    diverged: int

    def to_json(self) -> dict[str, Any]:
        """Returns an entry of `combinations` of `summary.json`."""
        return {
            **self.cell._asdict(),
            "learning_rate": self.learning_rate,
            "seeds": len(self.test),
            "diverged": self.diverged,
            "test_accuracy": estimate(self.test).to_json(),
            "gap": estimate(self.gap).to_json(),
        }


def measure(training: Training[Config], weights: dict) -> dict[Cell, Measured]:
    """Measures every combination at its best rate."""
    found, train = cells(training.config), training.dataset.train
    # Dropout and L2 are no part of the network at inference: one program for each norm.
    accuracy = {c.norm: crossed.accuracy(training, c.name, train) for c in found}
    best = crossed.best_runs(training.records)
    return {c: _measured(c, best[c.name], accuracy[c.norm], weights) for c in found}


def _measured(cell: Cell, runs: list[Record], accuracy, weights) -> Measured:
    keys = [r.run for r in runs]
    # What has diverged has no accuracy, and no gap.
    lost = [r.diverged_at is not None for r in runs]
    train = [0.0 if d else float(accuracy(weights[k])) for d, k in zip(lost, keys, strict=True)]
    test = [r.final() for r in runs]
    gap = [a - b for a, b in zip(train, test, strict=True)]
    validation = [r.final("validation_accuracy") for r in runs]
    return Measured(cell, runs[0].learning_rate, validation, test, gap, sum(lost))


def table(measured: Iterable[Measured]) -> Table:
    """A row for every combination."""
    return Table(
        "Test accuracy, and by how much that on the training set is higher, at the best "
        "learning rate of every combination",
        ["norm", "dropout", "L2", "learning rate", "test (%)", "gap (%)", "diverged"],
        [
            [
                m.cell.norm,
                *map(number, (m.cell.dropout, m.cell.l2, m.learning_rate)),
                *(crossed.percent_cell(estimate(values)) for values in (m.test, m.gap)),
                f"{m.diverged} of {len(m.test)}",
            ]
            for m in measured
        ],
    )


class Change(NamedTuple):
    """What the dropout of a combination does: estimates of the differences from none."""

    cell: Cell
    accuracy: Estimate
    gap: Estimate

    @property
    def helps(self) -> bool:
        """Whether it clearly raises the test accuracy, or lowers the gap."""
        return crossed.known(self.accuracy)[1] > 0 or crossed.known(self.gap)[2] < 0


def rows(config: Config, measured: dict[Cell, Measured]) -> Iterator[Published]:
    """What dropout does with each norm, and what BatchNorm does without dropout, at every L2.

    That dropout can be removed is not so if it helps with BatchNorm, is so if it helps without
    alone, and is not judged if it helps neither. That BatchNorm regularises is so if the
    interval of the gap's change is below 0.
    """
    both = {"none", "bn"} <= set(config.arms)
    l2s = config.l2s if 0.0 in config.dropouts else ()
    found = {l2: changes(config, measured, l2) for l2 in l2s if any(config.dropouts)}
    if both and found:
        yield Published("Does BatchNorm make dropout obsolete?", answer(found), claim=False)
    for l2 in l2s:
        own = found.get(l2, {})
        for change in own.values():
            yield _dropout_row(change, own.get("none"))
        if both:
            less = crossed.difference(
                measured[Cell("bn", 0.0, l2)].gap, measured[Cell("none", 0.0, l2)].gap
            )
            what = f"gap with BatchNorm less that without, no dropout, L2 {l2:g}"
            regularises = crossed.known(less)[2] < 0
            yield Published(what, crossed.points_text(less), REGULARISES, regularises)


def changes(config: Config, measured: dict[Cell, Measured], l2: float) -> dict[str, Change]:
    """By norm, what dropout does at the rate that is best on validation."""
    found = {}
    for norm in config.arms:
        dropped = [Cell(norm, d, l2) for d in config.dropouts if d]
        best = max(dropped, key=lambda cell: statistics.fmean(measured[cell].validation))
        own, kept = measured[best], measured[Cell(norm, 0.0, l2)]
        accuracy = crossed.difference(own.test, kept.test)
        found[norm] = Change(best, accuracy, crossed.difference(own.gap, kept.gap))
    return found


def answer(found: dict[float, dict[str, Change]]) -> str:
    """Whether BatchNorm makes dropout obsolete, of all weights of the L2 penalty."""
    weights: dict[str, list[str]] = {}
    for l2, own in found.items():
        text = ANSWERS[own["none"].helps, own["bn"].helps]
        weights.setdefault(text, []).append(f"{l2:g}")
    return "; ".join(f"L2 {', '.join(l2s)}: {text}" for text, l2s in weights.items())


def _dropout_row(change, without):
    cell = change.cell
    what = (
        f"{cell.norm}, L2 {cell.l2:g}: dropout {cell.dropout:g} changes test accuracy, and gap"
    )
    here = "{}, gap {}".format(*map(crossed.points_text, (change.accuracy, change.gap)))
    if cell.norm != "bn":
        return Published(what, here)
    removable = False if change.helps else True if without and without.helps else None
    return Published(what, here, OBSOLETE, removable)


def accuracy_and_gap(measured: dict[Cell, Measured]) -> Figure:
    """Against the dropout rate, a line for each norm."""
    norms, dropouts, l2s = (list(dict.fromkeys(v)) for v in zip(*measured, strict=True))
    styles = arm_styles(norms)
    figure = new_figure(width=1.2 + 2.0 * len(l2s), height=4.6)
    panels = figure.subplots(2, len(l2s), sharex=True, sharey="row", squeeze=False)
    for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
        for ax, l2 in zip(axes, l2s, strict=True):
            for i, norm in enumerate(norms):
                x = [j + 0.12 * (i - (len(norms) - 1) / 2) for j in range(len(dropouts))]
                own = (measured[Cell(norm, dropout, l2)] for dropout in dropouts)
                values = [estimate(getattr(m, name)) for m in own]
                crossed.draw_percent(ax, x, values, label=norm, **styles[norm].line())
            tidy(ax)
            ax.set_xticks(range(len(dropouts)), list(map(number, dropouts)))
        axes[0].set_ylabel(label)
    for top, bottom, l2 in zip(*panels, l2s, strict=True):
        top.set_title(f"L2 {number(l2)}", fontsize=10, loc="left")
        bottom.set_xlabel("dropout")
        bottom.set_xlim(-0.5, len(dropouts) - 0.5)
    add_legend(figure, panels[0, 0])
    return figure


if __name__ == "__main__":
    flags.main(Config, "experiments.regularisation")
