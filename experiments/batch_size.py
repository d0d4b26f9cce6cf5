"""What do accuracy and speed do from batches of 1 to batches of 1,024, with which norm?

An MLP on scikit-learn's digits by default. Every run sees as many examples, `--steps` times
`--batch_size`, in batches of `--batch_sizes`; each norm has at each batch size the learning
rate (and the momentum of running statistics) that ends best on the validation set. BatchNorm
is evaluated with its running statistics and, beside them, with the statistics of batches of
the test set that are as large as in training. A batch of 1 BatchNorm refuses; ghost batches
are trained where the batch is larger than one of them, as otherwise they are BatchNorm.

The claims: Wu & He 2018 (group normalisation), table 2, ResNet-50 on ImageNet; Ioffe 2017
(batch renormalisation), section 4, Inception-v3 on ImageNet.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import fixed, flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    from bn_jax.core.renorm import ramp
    from bn_jax.lab import crossed
    from bn_jax.lab.arms import ALONE, Arm, chosen_arms, norm_arms
    from bn_jax.lab.experiment import Training, run_experiment
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.report.tables import Table
    from bn_jax.lab.report.text import number, whole
    from bn_jax.lab.statistics import Record
    from bn_jax.lab.statistics.convergence import estimate
    from bn_jax.lab.watchers import Weights
    from bn_jax.linen import BatchRenorm, GhostBatchNorm
    from experiments import batch_size_figure as figure
    from experiments.batch_size_figure import Combination

EXPERIMENT = "batch_size"
QUESTION = "What do accuracy and speed do from batches of 1 to batches of 1,024?"
GHOST = 16
# Of Ioffe 2017's 130,000 steps plain batch normalisation takes 5,000; r_max and d_max grow
# until step 40,000 and 25,000.
RENORM_STEPS, RENORM_START, RENORM_R, RENORM_D = 130_000, 5_000, 40_000, 25_000
# Validation errors in per cent on ImageNet with batches of 32 and of 2 for each worker.
WU_HE = {"bn": (23.6, 34.7), "group": (24.1, 24.1)}
LARGE, SMALL = 32, 2
# Flags that say a number of steps of --batch_size examples.
IN_STEPS = ("steps", "eval_every", "warmup_steps", "decay_steps")
FLAT = 0.01  # an error that rises by no more than this is called flat
# Validation accuracy in per cent on ImageNet, statistics of 4 examples.
IOFFE, IOFFE_SIZE = {"bn": 74.2, "renorm": 76.5}, 4


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.batch_size --help`."""

    QUICK: ClassVar = {
        "batch_sizes": (1, 2, 4, 32, 512), "steps": 160, "eval_every": 80, "seeds": 3,
        "learning_rates": (0.03, 0.3, 1.0), "arms": ("none", "bn", "renorm", "group"),
        "momentums": (0.9,),
    }  # fmt: skip

    batch_sizes: tuple[int, ...] = flag(
        tuple(2**i for i in range(11)),
        "examples in a training step, to try",
        at_least=1,
        each_once=True,
    )
    epochs: None = fixed(None)  # --steps says how many examples a run sees
    arms: tuple[str, ...] = flag(
        ("none", "bn", "ghost", "renorm", "group", "layer"), "norms to compare, of these"
    )
    features: tuple[int, ...] | None = flag((64, 64))
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu")
    learning_rates: tuple[float, ...] = flag(
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "learning rates to try at every batch size"
    )
    momentums: tuple[float, ...] = flag((0.9, 0.99))
    seeds: int = flag(5)
    batch_size: int = flag(32, "the batch size that --steps and --eval_every are for")
    steps: int = flag(
        640, "training steps of a run with --batch_size examples; others see as many examples"
    )
    eval_every: int = flag(160, "steps between evaluations, of --batch_size examples too")

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        part = self.eval_every * self.batch_size
        for size in self.batch_sizes:
            if part % size:
                raise UserError(
                    f"--batch_sizes: {size} does not divide the {part} examples between "
                    "evaluations (--eval_every times --batch_size)"
                )


class Cell(NamedTuple):
    """One combination."""

    norm: str
    batch_size: int

    @property
    def name(self) -> str:
        """As an arm."""
        return f"{self.norm} {self.batch_size}"


def run(config: Config) -> dict[str, Any]:
    """Trains, fills the workdir, prints the tables; the summary comes back."""
    statistics = {c.name for c in cells(config) if has_statistics(c.norm)}
    weights = Weights(lambda arm, seed: arm in statistics)
    return run_experiment(
        config, arms(config), experiment=EXPERIMENT, question=QUESTION, refusal=ALONE,
        watch=weights, conclude=lambda training: conclude(training, weights.kept),
    )  # fmt: skip


def norms(steps: int) -> dict[str, Arm]:
    """The norms of a comparison, ghost batches, renormalisation over these steps."""
    start, r_max, d_max = (
        step * steps / RENORM_STEPS for step in (RENORM_START, RENORM_R, RENORM_D)
    )
    renorm = functools.partial(
        BatchRenorm, r_max=ramp(1.0, 3.0, start, r_max), d_max=ramp(0.0, 5.0, start, d_max)
    )
    ghost = functools.partial(GhostBatchNorm, group_size=GHOST)
    return norm_arms() | {
        "ghost": Arm(ghost),
        "renorm": Arm(renorm),
    }


def has_statistics(norm: str) -> bool:
    """Whether it has running statistics."""
    return norms(1)[norm].has_momentum


def cells(config: Config) -> list[Cell]:
    """All combinations, but for ghost batches that are the batch."""
    chosen = chosen_arms(config.arms, norms(1))
    return [
        Cell(norm, size)
        for norm in chosen
        for size in config.batch_sizes
        if norm != "ghost" or size > GHOST
    ]


def arms(config: Config) -> dict[str, Arm]:
    """Every combination, by its name; with as many examples, and evaluations, as any.

    The steps of a schedule are as many examples too.
    """

    def arm(cell):
        changes = {
            name: max(n * config.batch_size // cell.batch_size, 1)
            for name in IN_STEPS
            if (n := getattr(config, name))
        }
        changes["batch_size"] = cell.batch_size
        return norms(changes["steps"])[cell.norm]._replace(changes=changes)

    return {cell.name: arm(cell) for cell in cells(config)}


def conclude(training: Training[Config], weights: dict) -> Findings:
    """Accuracy and speed of every combination, and the claims."""
    best = crossed.best_runs(training.records)
    found = {cell: best.get(cell.name) for cell in cells(training.config)}
    combinations = [combination(training, weights, *item) for item in found.items()]
    accuracies = {c: [r.final() for r in runs] for c, runs in found.items() if runs}
    summary = {
        "examples": training.config.steps * training.config.batch_size,
        "combinations": [c.to_json() for c in combinations],
    }
    figures = [
        ("accuracy.png", figure.ACCURACY, figure.accuracy_against_batch(combinations)),
        ("speed.png", figure.SPEED, figure.speed_against_batch(combinations)),
    ]
    if any(c.batch_statistics for c in combinations):
        drawn = figure.two_evaluations(combinations)
        figures.append(("statistics.png", figure.STATISTICS, drawn))
    return Findings(summary, [table(combinations)], [*rows(accuracies)], figures)


def combination(
    training: Training[Config], weights: dict, cell: Cell, runs: list[Record] | None
) -> Combination:
    """Measures one; `runs` are those of its best point, None if refused."""
    if runs is None:
        return Combination(*cell)
    keys = [r.run for r in runs]
    in_batches = None
    if has_statistics(cell.norm):
        test = training.dataset.test
        accuracy = crossed.accuracy(training, cell.name, test, cell.batch_size)
        in_batches = estimate([float(accuracy(weights[key])) for key in keys])
    return Combination(
        *cell,
        learning_rate=runs[0].learning_rate,
        momentum=runs[0].momentum,
        seeds=len(runs),
        diverged=sum(r.diverged_at is not None for r in runs),
        test_accuracy=estimate([r.final() for r in runs]),
        batch_statistics=in_batches,
        examples_per_second=cell.batch_size / runs[0].seconds.per_step,
    )


def table(combinations: list[Combination]) -> Table:
    """A row for every combination."""

    def cells(c):
        if c.refused:
            return ["refused", "", "", "", ""]
        return [
            number(c.learning_rate),
            "" if c.momentum is None else number(c.momentum),
            crossed.percent_cell(c.test_accuracy),
            crossed.percent_cell(c.batch_statistics),
            whole(c.examples_per_second),
        ]

    columns = "norm, batch size, learning rate, momentum, test (%), with batch statistics (%), "
    return Table(
        "Test accuracy and speed at every batch size, at the best learning rate",
        (columns + "examples per second").split(", "),
        [[c.norm, str(c.batch_size), *cells(c)] for c in combinations],
    )


def rows(accuracies: dict[Cell, list[float]]) -> Iterator[Published]:
    """The claims, where the batch sizes are among those tried; differences seed by seed.

    Of BatchNorm the error rises if the interval is above 0, of group normalisation it is flat
    if the median is at most `FLAT`; renormalisation is better if its interval is above 0.
    """
    for norm, (large, small) in WU_HE.items():
        large_cell, small_cell = Cell(norm, LARGE), Cell(norm, SMALL)
        if large_cell in accuracies and small_cell in accuracies:
            rise = crossed.difference(accuracies[large_cell], accuracies[small_cell])
            middle, low, _ = crossed.known(rise)
            yield Published(
                quantity=f"{norm}: error with batches of {SMALL} less that of {LARGE}",
                here=crossed.points_text(rise),
                source=f"{small - large:+.1f} (Wu & He 2018, table 2)",
                agrees=low > 0 if norm == "bn" else middle <= FLAT,
            )
    renorm, plain = Cell("renorm", IOFFE_SIZE), Cell("bn", IOFFE_SIZE)
    if renorm in accuracies and plain in accuracies:
        gain = crossed.difference(accuracies[renorm], accuracies[plain])
        yield Published(
            quantity=f"accuracy of renorm less that of bn, batches of {IOFFE_SIZE}",
            here=crossed.points_text(gain),
            source=f"{IOFFE['renorm'] - IOFFE['bn']:+.1f} (Ioffe 2017, section 4)",
            agrees=crossed.known(gain)[1] > 0,
        )


if __name__ == "__main__":
    flags.main(Config, "experiments.batch_size")
