"""CIFAR-10 to 94 % in ten epochs: airbench94, and what BatchNorm does in it.

The recipe of Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"
(arXiv:2404.00498), and the same with another momentum of BatchNorm's running statistics, with
a scale that is trained (at the rate of the kernels), with biases that are trained at the rate
of the kernels, with ghost batches of two sizes, and without BatchNorm, whose place then
biases of the convolutions take, at the best of several rates.

Otherwise than in the source: GELU is by its tanh approximation; the gradient of a max-pool is
shared where there are several maxima; parameters are float32, as are activations unless
`--dtype=bfloat16`, where the source has float16 for both; and every evaluation, not only the
last, is with all views of an image. The source's seconds are of whitening, training and the
last evaluation; ours are of training and an evaluation, a run's share where several train
together, and whitening, which is done once for all runs, is left out.

Made for a GPU, where a run takes seconds; on two cores it takes hours, and `--quick` trains
a narrow network on digits.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import fixed, flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    from bn_jax.lab.arms import Arm, chosen_arms
    from bn_jax.lab.experiment import Training, run_experiment
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.report.comparison import Outcome
    from bn_jax.lab.report.figures import learning_curves
    from bn_jax.lab.statistics import ArmResult, Record, summarize
    from bn_jax.lab.statistics.convergence import Estimate, estimate, mean_interval
    from bn_jax.linen import BatchNorm, GhostBatchNorm
    from experiments import cifar_speedrun_figure as figure
    from experiments import cifar_speedrun_recipe as recipe
    from experiments.cifar_speedrun_figure import Measured

ENTRIES = ("budget_steps", "target", "by_point")  # of a comparison without a baseline
EXPERIMENT = "cifar_speedrun"
QUESTION = "What does BatchNorm do for a network that learns CIFAR-10 in seconds?"
EPSILON = 1e-12
# Factors on the learning rate that the network without BatchNorm tries.
RATES_WITHOUT = (1.0, 0.3, 0.1, 0.03)
GHOST_SIZES = (32, 128)
ARMS = (
    "bn", "momentum_0.9", "momentum_0.99", "scale", "bias_rate_1", "ghost_32", "ghost_128",
    "none",
)  # fmt: skip
# Mean accuracy of 1,000 runs, and the epochs and seconds of one, on an A100.
PUBLISHED, PUBLISHED_EPOCHS, PUBLISHED_SECONDS = 0.9401, 9.9, 3.09
POINTS = 0.002  # so near to the published accuracy it agrees
# Flags that make a run another one than the source's.
WHOLE = (
    "dataset", "train_examples", "test_examples", "validation_fraction", "scaling", "features",
    "activation", "learning_rates", "init_scales", "momentums", "weight_decay", "bias_rate",
    "label_smoothing", "translate", "views", "batch_size", "steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.cifar_speedrun --help`."""

    # Digits are a thirtieth of CIFAR-10: the same epochs move the weights by so much less.
    QUICK: ClassVar = {
        "dataset": "digits", "features": (16, 32), "learning_rates": (30.0,),
        "batch_size": 64, "steps": 208, "eval_every": 26, "seeds": 2, "target": 0.9,
        "translate": 1, "arms": ("bn", "bias_rate_1", "none"),
    }  # fmt: skip

    dataset: str = flag("cifar10")
    validation_fraction: float = flag(
        0.0, "share of the training examples held out; 0: train on all"
    )
    model: str = fixed("airbench")
    # The recipe has its own, and --steps says how long a run is.
    optimizer: str = fixed("sgd")
    schedule: str = fixed("constant")
    warmup_steps: int = fixed(0)
    decay_steps: None = fixed(None)
    decay_rate: float = fixed(0.1)
    l2: float = fixed(0.0)
    decay_norms: bool = fixed(False)
    clip: None = fixed(None)
    augment: tuple[()] = fixed(())
    epochs: None = fixed(None)
    activation: str = flag("gelu", "relu, sigmoid, tanh, elu or gelu")
    arms: tuple[str, ...] = flag(ARMS, "the recipe, bn, and what to change in it, of these")
    learning_rates: tuple[float, ...] = flag(
        (11.5,), "learning rates for 1,024 examples; none tries 1, .3, .1 and .03 of each"
    )
    momentums: tuple[float, ...] = flag((0.6,))
    weight_decay: float = flag(
        0.0153, "share of the weights that 1,024 examples take, relative to the schedule"
    )
    bias_rate: float = flag(64.0, "factor on the learning rate of BatchNorm's biases", above=0)
    label_smoothing: float = flag(0.2)
    translate: int = flag(2, "pixels that a training image is moved by at most", at_least=0)
    views: int = flag(
        6, "views of an image in an evaluation: 1, 2 (mirrored) or 6 (moved)", choices=(1, 2, 6)
    )
    dtype: str = flag(
        "float32", "of the activations: float32 or bfloat16", choices=("float32", "bfloat16")
    )
    seeds: int = flag(20)
    batch_size: int = flag(1024)
    steps: int = flag(476, "training steps of a run; 476 are 9.9 epochs of CIFAR-10")
    eval_every: int = flag(34)
    target: float = flag(0.94)

    @property
    def is_whole(self) -> bool:
        """Whether it is the source's network and training, at its size."""
        return self.is_as(Config(), WHOLE)


def run(config: Config) -> dict[str, Any]:
    """Trains, fills the workdir, prints the tables; the summary comes back."""
    return run_experiment(
        config, chosen_arms(config.arms, arms(config)), experiment=EXPERIMENT,
        question=QUESTION, conclude=conclude, load=recipe.load, build=recipe.build,
    )  # fmt: skip


def arms(config: Config) -> dict[str, Arm]:
    """The recipe, and one change in it each."""
    fields = {"epsilon": EPSILON, "use_scale": False, "unbiased": True}
    norm = functools.partial(BatchNorm, **fields)
    ghosts = {n: functools.partial(GhostBatchNorm, group_size=n, **fields) for n in GHOST_SIZES}
    rates = {
        f"{factor * rate:.9g}" for rate in config.learning_rates for factor in RATES_WITHOUT
    }
    return {
        "bn": Arm(norm),
        "momentum_0.9": Arm(norm, {"momentums": (0.9,)}),
        "momentum_0.99": Arm(norm, {"momentums": (0.99,)}),
        "scale": Arm(functools.partial(norm, use_scale=True)),
        "bias_rate_1": Arm(norm, {"bias_rate": 1.0}),
        **{f"ghost_{n}": Arm(ghost) for n, ghost in ghosts.items()},
        "none": Arm(None, {"learning_rates": tuple(sorted(map(float, rates)))}),
    }


def conclude(training: Training[Config]) -> Findings:
    """Accuracy, epochs and seconds of every arm at its best point, beside the source's."""
    config, records = training.config, training.records
    whole = summarize(records, baseline=records[0].arm, target=config.target)
    arms = [measured(training, arm) for arm in whole.arms]
    summary = {
        k: v for k, v in whole.to_json().items() if k in ("budget_steps", "target", "by_point")
    }
    curves = learning_curves(records, Outcome(**vars(whole)))
    target = whole.target.value
    return Findings(
        summary | {"arms": [arm.to_json() for arm in arms]},
        [figure.table(arms, target)],
        [*rows(config, arms)],
        [
            ("accuracy.png", figure.CAPTION, figure.accuracies(arms, target)),
            ("learning_curves.png", figure.CURVES, curves),
        ],
    )


def measured(training: Training[Config], arm: ArmResult) -> Measured:
    """Returns the arm with every run's accuracy, their mean, epochs and seconds."""
    config, runs = training.config, training.at(arm)
    accuracies = [r.final() for r in runs]
    low, high = mean_interval(accuracies)
    epoch = recipe.per_epoch(config, training.dataset)
    needed, *ends = (
        v and v / epoch for v in (arm.steps_to_target.median, *arm.steps_to_target.ci95)
    )
    return Measured(
        arm,
        accuracies,
        Estimate(statistics.fmean(accuracies), (low, high), len(runs)),
        config.steps / epoch,
        Estimate(needed, (ends[0], ends[1]), len(runs)),
        estimate([run_seconds(r) for r in runs]),
    )


def run_seconds(record: Record) -> float:
    """Of training and of one evaluation, the last as it were."""
    return record.seconds.training + record.seconds.evaluation / len(record.steps)


def rows(config: Config, found: list[Measured]) -> Iterator[Published]:
    """The recipe beside the source: mean accuracy, epochs, seconds (of another machine).

    These are of training and the last evaluation.
    """
    for arm in found:
        value, seconds = arm.mean_accuracy.median, arm.run_seconds.median
        if arm.result.arm != "bn" or value is None or seconds is None:
            continue
        yield Published(
            quantity=f"bn: test accuracy, mean of {arm.result.seeds} runs",
            here=f"{value:.2%}" + ("" if config.is_whole else f" ({config.dataset})"),
            source=f"{PUBLISHED:.2%} (1,000 runs)",
            agrees=abs(value - PUBLISHED) <= POINTS if config.is_whole else None,
        )
        yield Published(
            quantity="bn: epochs of a run",
            here=f"{arm.epochs:.1f}",
            source=f"{PUBLISHED_EPOCHS}",
            claim=False,
        )
        yield Published(
            quantity="bn: seconds of a run, its last evaluation among them",
            here=f"{seconds:.3g}",
            source=f"{PUBLISHED_SECONDS} (A100)",
            claim=False,
        )


if __name__ == "__main__":
    flags.main(Config, "experiments.cifar_speedrun")
