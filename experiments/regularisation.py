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
from typing import Any, ClassVar, NamedTuple

from bn_jax.errors import UserError
from experiments import compare, crossed, flags
from experiments.arms import chosen_arms, norm_arms
from experiments.conduct import conduct
from experiments.flags import flag

EXPERIMENT = "regularisation"
QUESTION = "Does BatchNorm make dropout obsolete on a small training set?"
OBSOLETE = "dropout can be removed without more overfitting (Ioffe & Szegedy 2015, 4.2.1)"
# By whether dropout helps without BatchNorm, and with it.
ANSWERS = {
    (True, False): "yes, dropout clearly helps without BatchNorm and not with it",
    (True, True): "no, dropout clearly helps with BatchNorm too",
    (False, True): "no, dropout clearly helps with BatchNorm and not without it",
    (False, False): "nothing to make obsolete, dropout does not clearly help without "
    "BatchNorm or with it",
}
REGULARISES = "BatchNorm regularises (Ioffe & Szegedy 2015, 3.4)"


@dataclasses.dataclass(frozen=True)
class Config(compare.Config):
    """Every flag of the experiment; see `python -m experiments.regularisation --help`."""

    LISTS: ClassVar = (*compare.Config.LISTS, "dropouts", "l2s")
    QUICK: ClassVar = {
        "dataset": "digits", "train_examples": 200, "dropouts": (0.0, 0.3), "l2s": (0.0, 0.01),
        "steps": 300, "learning_rates": (0.1,),
    }  # fmt: skip

    dropouts: tuple[float, ...] = flag((0.0, 0.2, 0.5), "shares of the units to drop")
    l2s: tuple[float, ...] = flag((0.0, 0.001, 0.01), "weights of the L2 penalty")
    dataset: str = flag("mnist", "as in experiments.compare")
    train_examples: int | None = flag(500, "train on so many, chosen at random")
    validation_fraction: float = flag(0.02, "of all examples, to choose learning rates on")
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu")
    learning_rates: tuple[float, ...] = flag((0.1, 0.3, 1.0), "learning rates to try")
    seeds: int = flag(10, "how many seeds at each point of the grid")
    steps: int = flag(600, "training steps of a run")
    batch_size: int = flag(50, "examples in a training step")
    eval_every: int = flag(300, "training steps between evaluations; divides steps")

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        for name, top in (("dropouts", 1), ("l2s", float("inf"))):
            for value in getattr(self, name):
                if not 0 <= value < top:
                    raise UserError(f"--{name}: {value} must be at least 0 and below {top}")


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
    from experiments.watchers import Weights

    weights = Weights()
    return conduct(
        config, arms(config), experiment=EXPERIMENT, question=QUESTION, watch=weights,
        conclude=lambda training: conclude(training, weights.kept),
    )  # fmt: skip


def cells(config: Config) -> list[Cell]:
    """All combinations."""
    return [
        Cell(norm, dropout, l2)
        for norm in config.arms
        for l2 in config.l2s
        for dropout in config.dropouts
    ]


def arms(config: Config) -> dict[str, compare.Arm]:
    """Every combination, by its name."""
    for name, many in (("dropout", "dropouts"), ("l2", "l2s")):
        if getattr(config, name):
            raise UserError(f"--{name}: here --{many} has the values")
    norms = chosen_arms(config, norm_arms())
    return {
        c.name: norms[c.norm]._replace(changes={"dropout": c.dropout, "l2": c.l2})
        for c in cells(config)
    }


def conclude(training: compare.Training, weights: dict) -> compare.Extra:
    """Accuracies and gaps of every combination, their differences, and the claims."""
    from bn_jax.report.regularisation import CAPTION, accuracy_and_gap

    measured = measure(training, weights)
    combinations = [row(cell, own) for cell, own in measured.items()]
    summary = {
        "budget_steps": training.config.steps,
        "combinations": combinations,
        "tables": [table(combinations)],
        "published": list(rows(training.config, measured)),
    }
    figure = accuracy_and_gap(combinations)
    return compare.Extra(summary, (("accuracy_and_gap.png", CAPTION, figure),))


class Measured(NamedTuple):
    """Of one combination at its best rate: the rate, and by seed what was measured."""

    learning_rate: float
    validation: list[float]
    test: list[float]
    gap: list[float]
    diverged: int


def measure(training: compare.Training, weights: dict) -> dict[Cell, Measured]:
    """Of every combination at its best rate."""
    from bn_jax.measure import Point

    # Dropout and L2 are no part of the network at inference: one program for each norm.
    accuracy = {
        cell.norm: crossed.accuracy(training, cell.name, training.dataset.train)
        for cell in cells(training.config)
    }
    best = crossed.best_runs(training.records)
    measured = {}
    for cell in cells(training.config):
        runs = best[cell.name]
        keys = [(cell.name, Point.of(r), r["seed"]) for r in runs]
        test = [crossed.final(r) for r in runs]
        # What has diverged has no accuracy, and no gap.
        train = [
            0.0 if r["diverged_at"] is not None else float(accuracy[cell.norm](weights[key]))
            for r, key in zip(runs, keys, strict=True)
        ]
        measured[cell] = Measured(
            runs[0]["learning_rate"],
            [crossed.final(r, "validation_accuracy") for r in runs],
            test,
            [a - b for a, b in zip(train, test, strict=True)],
            sum(r["diverged_at"] is not None for r in runs),
        )
    return measured


def row(cell: Cell, own: Measured) -> dict[str, Any]:
    """A combination as `summary.json` has it."""
    return {
        **cell._asdict(),
        "learning_rate": own.learning_rate,
        "seeds": len(own.test),
        "diverged": own.diverged,
        "test_accuracy": crossed.estimate(own.test),
        "gap": crossed.estimate(own.gap),
    }


def table(combinations: list[dict]) -> dict[str, Any]:
    """A row for every combination."""
    from bn_jax.report.text import estimate, number, percent

    def text(value):
        return estimate(value, percent, open_end="-", missing="-")

    return {
        "title": "Test accuracy, and by how much that on the training set is higher, at the "
        "best learning rate of every combination",
        "header": ["norm", "dropout", "L2", "learning rate", "test (%)", "gap (%)", "diverged"],
        "rows": [
            [
                c["norm"], number(c["dropout"]), number(c["l2"]), number(c["learning_rate"]),
                text(c["test_accuracy"]), text(c["gap"]), f"{c['diverged']} of {c['seeds']}",
            ]
            for c in combinations
        ],
    }  # fmt: skip


class Change(NamedTuple):
    """What the dropout of a combination does: estimates of the differences from none."""

    cell: Cell
    accuracy: dict[str, Any]
    gap: dict[str, Any]

    @property
    def helps(self) -> bool:
        """Whether it clearly raises the test accuracy, or lowers the gap."""
        return self.accuracy["ci95"][0] > 0 or self.gap["ci95"][1] < 0


def rows(config: Config, measured: dict[Cell, Measured]) -> Any:
    """What dropout does with each norm, and what BatchNorm does without dropout, at every L2.

    That dropout can be removed is not so if it helps with BatchNorm, is so if it helps without
    alone, and is not judged if it helps neither. That BatchNorm regularises is so if the
    interval of the gap's change is below 0.
    """
    both = {"none", "bn"} <= set(config.arms)
    l2s = config.l2s if 0.0 in config.dropouts else ()
    found = {l2: changes(config, measured, l2) for l2 in l2s if any(config.dropouts)}
    if both and found:
        yield {
            "quantity": "Does BatchNorm make dropout obsolete?", "here": answer(found),
            "source": None,
        }  # fmt: skip
    for l2 in l2s:
        own = found.get(l2, {})
        for change in own.values():
            yield _dropout_row(change, own.get("none"))
        if both:
            less = crossed.difference(
                measured[Cell("bn", 0.0, l2)].gap, measured[Cell("none", 0.0, l2)].gap
            )
            yield {
                "quantity": f"gap with BatchNorm less that without, no dropout, L2 {l2:g}",
                "here": crossed.points_text(less),
                "source": REGULARISES,
                "agrees": less["ci95"][1] < 0,
            }


def changes(config: Config, measured: dict[Cell, Measured], l2: float) -> dict[str, Change]:
    """By norm, what dropout does at the rate that is best on validation."""
    found = {}
    for norm in config.arms:
        dropped = [Cell(norm, d, l2) for d in config.dropouts if d]
        best = max(dropped, key=lambda cell: _mean(measured[cell].validation))
        own, kept = measured[best], measured[Cell(norm, 0.0, l2)]
        found[norm] = Change(
            best,
            crossed.difference(own.test, kept.test),
            crossed.difference(own.gap, kept.gap),
        )
    return found


def answer(found: dict[float, dict[str, Change]]) -> str:
    """Whether BatchNorm makes dropout obsolete, of all weights of the L2 penalty."""
    weights: dict[str, list[str]] = {}
    for l2, own in found.items():
        text = ANSWERS[own["none"].helps, own["bn"].helps]
        weights.setdefault(text, []).append(f"{l2:g}")
    return "; ".join(f"L2 {', '.join(l2s)}: {text}" for text, l2s in weights.items())


def _dropout_row(change, without):
    cell, bn = change.cell, change.cell.norm == "bn"
    removable = False if change.helps else True if without and without.helps else None
    texts = crossed.points_text(change.accuracy), crossed.points_text(change.gap)
    return {
        "quantity": f"{cell.norm}, L2 {cell.l2:g}: dropout {cell.dropout:g} changes test "
        "accuracy, and gap",
        "here": "{}, gap {}".format(*texts),
        "source": OBSOLETE if bn else None,
        "agrees": removable if bn else None,
    }


def _mean(values):
    return sum(values) / len(values)


if __name__ == "__main__":
    flags.main(Config, run)
