"""Sigmoids on MNIST: is a network with BatchNorm better, sooner and steadier inside?

Ioffe & Szegedy 2015, section 4.1: 28x28 pixels of 0 and 1, three layers of 100 sigmoids,
softmax cross-entropy, 50,000 steps with batches of 60; with BatchNorm before each sigmoid and
without. Test accuracy against steps (figure 1a), and the 15th, 50th and 85th percentile of the
input of a typical sigmoid of the last hidden layer (figures 1b and c).

What the paper leaves open, and what is done here: plain SGD; each arm at the best learning rate
of a grid; "small random Gaussian" weights are Glorot's, Gaussian and cut off at two standard
deviations (.05 in the first layer, .1 in the others); 5,000 of the 60,000 training images are
held out, to choose the learning rate on. The typical sigmoid is the one of median drift among
the 100 (`drift.py`). Percentiles are over 1,000 of the test images, and with
running statistics, as the network is used after training: they include what these lag behind.

Drift is told over the whole of training, which goes on long after both networks have settled,
and over its first tenth; at each arm's best rate, and with all arms at the same. At rates of 10
and more the network without BatchNorm does not diverge, as sigmoids are bounded: its loss stays
finite and its accuracy at chance, so it is counted in "rates that train", not in "diverged".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import fixed, flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    import numpy as np

    from bn_jax.lab import comparison
    from bn_jax.lab.experiment import Training
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.report.text import bracketed, number, whole
    from bn_jax.lab.statistics import ArmResult
    from bn_jax.lab.statistics.convergence import median, median_interval
    from experiments import mnist_sigmoid_figure as figure
    from experiments.mnist_sigmoid_percentiles import (
        PERCENTILES,
        Percentiles,
        drift,
        drift_summary,
        sample,
        typical_unit,
    )

EXPERIMENT = "mnist_sigmoid"
QUESTION = "Is a network of sigmoids better, sooner and steadier inside with BatchNorm?"
# Section 4.1. Its claims have no numbers; "much more stable" is taken as half the drift.
SETTING = {
    "dataset": "mnist", "scaling": "binary", "features": (100, 100, 100),
    "activation": "sigmoid", "places": ("before",), "batch_size": 60, "steps": 50_000,
}  # fmt: skip
MUCH = 2
STABLE = "much more stable with BN"


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.mnist_sigmoid --help`."""

    QUICK: ClassVar = {
        "dataset": "digits", "learning_rates": (0.3, 3.0), "seeds": 3, "steps": 3000,
        "eval_every": 60, "validation_fraction": 0.2,
    }  # fmt: skip

    dataset: str = flag("mnist")
    scaling: str = flag("binary")
    validation_fraction: float = flag(1 / 12)
    model: str = fixed("mlp")  # whose units are watched
    features: tuple[int, ...] = flag((100, 100, 100))
    activation: str | None = flag("sigmoid")
    places: tuple[str, ...] | None = flag(("before",))
    learning_rates: tuple[float, ...] = flag((0.1, 1.0, 3.0))
    steps: int = flag(50_000)
    eval_every: int = flag(500)


def run(config: Config) -> dict[str, Any]:
    """Compares, fills the workdir, prints the tables; the summary comes back."""
    watch = Percentiles()
    return comparison.run(
        config, experiment=EXPERIMENT, question=QUESTION, watch=watch,
        further=lambda training: conclude(training, watch.kept),
    )  # fmt: skip


def conclude(training: Training[Config], paths: dict) -> Findings:
    """The drift of every arm, the source's claims beside ours, and the figures."""
    summary = training.summary
    tenth = {run: own[: max(2, len(own) // 10)] for run, own in paths.items()}
    drifts = {
        "percentiles": PERCENTILES,
        "images": len(sample(training.dataset)),
        **drift_summary(training.records, summary, paths),
        "first_tenth": drift_summary(training.records, summary, tenth),
    }
    shown = {arm.arm: unit_paths(training, arm, paths) for arm in summary.arms}
    figures = [
        ("typical_unit.png", figure.TYPICAL, figure.typical_units(summary, shown)),
        ("all_units.png", figure.all_units_caption(shown), figure.all_units(summary, shown)),
    ]
    return Findings({"drift": drifts}, published=[*rows(training, drifts)], figures=figures)


def unit_paths(training: Training[Config], arm: ArmResult, paths: dict) -> figure.Paths:
    """Those of the first seed of an arm at its own best point."""
    own = np.stack(paths[arm.arm, arm.point, training.config.seed])
    steps = np.array(training.records[0].steps[1:][: len(own)])
    return figure.Paths(steps, own, drift(own), typical_unit(drift(own)))


def rows(training: Training[Config], drift: dict) -> Iterator[Published]:
    """Every arm beside the baseline; for none and bn, what the source claims of them.

    A claim agrees where the 95 % interval of ours holds nothing else: of the difference in
    accuracy, of the ratio of steps, of the ratio of drifts. It is judged in runs of the
    source's setting with more than one seed.
    """
    base = training.summary.baseline
    for place, arm in enumerate(training.summary.arms[1:], 1):
        names = f"{base} / {arm.arm}"
        claimed = names == "none / bn"
        judged = claimed and is_the_sources(training.config)
        for what, here, claim, holds in (
            accuracies(training, place), steps(training, place), *drifts(drift, place)
        ):  # fmt: skip
            yield Published(
                quantity=f"{names}: {what}",
                here=here,
                source=claim if claimed else None,
                agrees=holds if judged and claim else None,
                reason=reason(drift, place) if claim == STABLE else None,
            )


def is_the_sources(config: Config) -> bool:
    """Whether a run tells anything of the source's claims."""
    return config.seeds > 1 and all(getattr(config, k) == v for k, v in SETTING.items())


def accuracies(training: Training[Config], place: int) -> tuple[str, str, str, bool]:
    """After the last step; the difference is of the two runs of a seed."""
    arms = training.summary.arms
    base, own = ([100 * r.final() for r in training.at(arm)] for arm in (arms[0], arms[place]))
    more = [b - a for a, b in zip(base, own, strict=True)]
    low, high = median_interval(more)
    here = (
        f"{median(base):.2f} / {median(own):.2f}, {median(more):+.2f} [{low:.2f}, {high:.2f}]"
    )
    return (
        "last test accuracy (%), difference",
        here,
        "higher with BN",
        above({"ci95": [low, high]}, 0),
    )


def steps(training: Training[Config], place: int) -> tuple[str, str, str, bool]:
    """To the target, which is the best of the baseline."""
    summary = training.summary
    medians = [a.steps_to_target.median for a in summary.arms]
    ratio = summary.speedups[place - 1].steps.to_json()
    what = f"steps to {summary.target.value:.2%}, ratio"
    here = _ratio(medians[0], medians[place], ratio, whole)
    return what, here, "fewer with BN", above(ratio, 1)


def drifts(drift: dict, place: int) -> Iterator[tuple[str, str, str | None, bool]]:
    """Of the percentiles: each arm at its best point, then all at one rate after the other."""
    compared: list[tuple[str, dict, str | None]] = [("drift, ratio", drift, STABLE)]
    compared.append(("drift in the first tenth, ratio", drift["first_tenth"], None))
    compared += [(f"drift at {_rate(block)}, ratio", block, None) for block in drift["by_rate"]]
    for what, block, claim in compared:
        medians = [arm["median"] for arm in block["arms"]]
        ratio = block["times_smaller"][place - 1]
        here = _ratio(medians[0], medians[place], ratio, number)
        yield what, here, claim, above(ratio, MUCH)


def reason(drift: dict, place: int) -> str:
    """Where the ratio of drifts is largest and smallest, as the source leaves its rate open."""

    def ratio(block):
        return block["times_smaller"][place - 1]["ratio"]

    known = sorted((b for b in drift["by_rate"] if ratio(b) is not None), key=ratio)
    text = "The paper does not state its learning rate"
    if len(known) > 1:
        least, *_, most = ((number(ratio(b)), _rate(b)) for b in known)
        text += ", and the ratio depends on it: {} at {}, {} at {}".format(*most, *least)
    return f"{text}."


def above(ratio: dict, bound: float) -> bool:
    """Whether the whole interval is; an end that is None is infinite."""
    low = ratio["ci95"][0]
    return low is None or low > bound


def _rate(block):
    """ "rate 0.1", with the initial scale where that is not 1."""
    rate, scale = (block["arms"][0][field] for field in ("learning_rate", "init_scale"))
    return f"rate {number(rate)}" + (f", scale {number(scale)}" if scale != 1 else "")


def _ratio(base, own, ratio, form):
    """ "4,500 / 900 = 5 [4, ∞]"; a median that was not reached is a "-", as is its ratio."""
    texts = ["-" if v is None else form(v) for v in (base, own)]
    value = "-" if ratio["ratio"] is None else number(ratio["ratio"])
    return f"{' / '.join(texts)} = {value} {bracketed(ratio['ci95'], number, '∞')}".rstrip()


if __name__ == "__main__":
    flags.main(Config, "experiments.mnist_sigmoid")
