"""Does BatchNorm help an LSTM, after it or in its recurrence?

Images are read row by row, or pixel by pixel; what the LSTM remembers at the end is classified.
Arms: none; lstm_bn, with BatchNorm between LSTM and dense layer; recurrent_.1 and recurrent_1,
with BatchNorm in the recurrence, each step with statistics of its own, and an initial scale of
.1 or 1. All are as wide as `--features` says, 100 by default.

The tutorial whose network lstm_bn is (LSTM, BN, Dense) has 32 units:

    python -m experiments.lstm --arms=none,lstm_bn --features=32

Cooijmans et al. 2016 ("Recurrent Batch Normalization", section 5.1): MNIST pixel by pixel,
also in an order permuted once; LSTM of 100, RMSprop with rate .001 and decay .9, gradients
clipped at a norm of 1, 50,000 images to train and 10,000 to validate; batches of 100 and 200
epochs in the authors' code, which are the 100,000 steps of their figure 3. By default here
rows, and fewer steps; their size, evaluated after every epoch, is

    python -m experiments.lstm --read=pixels --steps=100000 --eval_every=500

and the same with `--permuted`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import fixed, flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    import jax

    from bn_jax.lab import comparison
    from bn_jax.lab.arms import Arm, norm_arms
    from bn_jax.lab.crossed import known
    from bn_jax.lab.experiment import Training
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.report.text import in_line, number, percent
    from bn_jax.lab.statistics import ArmResult, Summary
    from bn_jax.lab.statistics.convergence import Estimate, Ratio
    from bn_jax.lab.sweeps import Evaluation, Point
    from bn_jax.linen import BatchNorm
    from experiments.lstm_gradients import CAPTION, gradient_norms, gradients_through_time

EXPERIMENT = "lstm"
QUESTION = "Does BatchNorm help an LSTM, after it or in its recurrence?"
STEPS = 100_000
# Test accuracy in per cent after so many, without and with a permutation (table 1).
PUBLISHED = {False: {"none": 98.9, "recurrent_.1": 99.0},
             True: {"none": 90.2, "recurrent_.1": 95.4}}  # fmt: skip
# "Nearly constant" is less than this factor from end to end: the source draws the norms on a
# logarithmic axis, on which it is one decade; an LSTM without BatchNorm loses more than that
# within the 64 pixels of a digit.
DECADE = 10
# Section 4: with a scale of .1 the norm of the gradient is nearly constant, with 1 it vanishes.
GRADIENTS = {
    "recurrent_.1": ("nearly 1 (tanh)", 1 / DECADE, DECADE),
    "recurrent_1": ("nearly 0 (tanh)", 0, 1 / DECADE),
}
VANISHING_REASON = (
    "The source's figure is of a network with tanh alone, which a large scale saturates. "
    "Through the gates of an LSTM the gradient grows instead; perhaps as it does through many "
    "layers with BatchNorm at the start (Yang et al. 2019, 'A mean field theory of batch "
    "normalization')."
)
NOISE = 0.1  # of the first hidden state, in the authors' code


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.lstm --help`."""

    QUICK: ClassVar = {
        "dataset": "digits", "features": (32,), "seeds": 2, "steps": 300, "eval_every": 20,
    }  # fmt: skip

    dataset: str = flag("mnist")
    validation_fraction: float = flag(1 / 6)
    scaling: str = flag("unit")
    model: str = fixed("lstm")
    read: str = flag(
        "rows", "what a step of the LSTM sees of an image", choices=("rows", "pixels")
    )
    permuted: bool = flag(False, "the pixels in an order that is drawn once")
    features: tuple[int, ...] | None = flag(
        (100,), "width of the LSTM in all arms; 32 in the tutorial that lstm_bn is from"
    )
    arms: tuple[str, ...] = flag(
        ("none", "lstm_bn", "recurrent_.1", "recurrent_1"),
        "networks to compare, of these and the norms of experiments.compare after the LSTM",
    )
    optimizer: str = flag("rmsprop")
    learning_rates: tuple[float, ...] = flag((0.001,))
    clip: float | None = flag(1.0)
    steps: int = flag(2000)
    batch_size: int = flag(100)
    eval_every: int = flag(200)


def run(config: Config) -> dict[str, Any]:
    """Compares, fills the workdir, prints the tables; the summary comes back."""
    ends = Ends(config.seed)
    return comparison.run(
        config, experiment=EXPERIMENT, question=QUESTION, known=arms(config), watch=ends,
        further=lambda training: conclude(training, ends.kept),
    )  # fmt: skip


def arms(config: Config) -> dict[str, Arm]:
    """The four networks, and the norms of a comparison after the LSTM."""
    reads = {"read": config.read, "permutation_seed": 0 if config.permuted else None}
    after, recurrent = {"places": ("output",)}, {"places": ("recurrent",)}

    def recurrent_arm(scale):
        model = {**reads, "initial_scale": scale, "noise": NOISE}
        return Arm(BatchNorm, recurrent, model)

    return {name: Arm(arm.norm, after, reads) for name, arm in norm_arms().items()} | {
        "lstm_bn": Arm(BatchNorm, after, reads),
        "recurrent_.1": recurrent_arm(0.1),
        "recurrent_1": recurrent_arm(1.0),
    }


class Ends:
    """Keeps the variables of one seed before the first step and after the last.

    Attributes:
      kept: by (arm, `Point`, `start` or `end`).
    """

    def __init__(self, seed: int):
        self.kept: dict[tuple[str, Point, str], dict[str, Any]] = {}
        self._seed = seed

    def __call__(self, arm: str, evaluation: Evaluation) -> None:
        """To be a `watch` of `bn_jax.lab.comparison.run`."""
        chunk = evaluation.chunk
        if self._seed not in chunk.seeds or (evaluation.step and not evaluation.last):
            return
        for i, point in enumerate(chunk.points):
            train = evaluation.state(i, list(chunk.seeds).index(self._seed)).train
            variables = {"params": train.params, "batch_stats": train.batch_stats}
            self.kept[arm, point, "end" if evaluation.step else "start"] = variables


def conclude(training: Training[Config], kept: dict) -> Findings:
    """The published numbers beside ours, and the gradient through time."""
    norms = {a.arm: through_time(training, a, kept) for a in training.summary.arms}
    figure = gradients_through_time(norms)
    return Findings(
        {"variant": variant(training.config), "gradient_norms": norms},
        published=[*rows(training.config, training.summary, norms)],
        figures=[("gradients_through_time.png", CAPTION, figure)],
    )


def variant(config: Config) -> str:
    """How images are read."""
    return config.read + (", permuted" if config.permuted else "")


def through_time(training: Training[Config], arm: ArmResult, kept: dict) -> dict[str, list]:
    """`gradient_norms` by end, at the arm's best point."""
    name, point, train = arm.arm, arm.point, training.dataset.train
    n, key = training.config.batch_size, jax.random.key(training.config.seed)
    batch = training.runs[name].scaled(train.inputs[:n]), train.labels[:n]
    model = training.model(name, point)
    norms = jax.jit(lambda variables: gradient_norms(model, variables, *batch, key=key))
    return {
        end: [float(v) if math.isfinite(v) else None for v in norms(kept[name, point, end])]
        for end in ("start", "end")
    }


def rows(config: Config, summary: Summary, norms: dict) -> Iterator[Published]:
    """Accuracies, steps against the LSTM without, and what the gradient loses on its way."""
    published = {}
    if (config.dataset, config.read) == ("mnist", "pixels"):
        published = PUBLISHED[config.permuted]
    for arm in summary.arms:
        name, accuracy = arm.arm, arm.max_accuracy
        source = published.get(name)
        _, low, high = known(accuracy)
        agrees = None
        if source and config.steps >= STEPS:
            agrees = 100 * low - 0.05 <= source <= 100 * high + 0.05
        yield Published(
            quantity=f"{name}: highest test accuracy (%)",
            here=in_line(accuracy, percent),
            source=f"{source:g}" if source else None,
            agrees=agrees,
        )
    yield from _faster(config, summary)
    yield from _vanishing(config, norms)


def _faster(config: Config, summary: Summary) -> Iterator[Published]:
    for faster in summary.speedups:
        if (faster.over.arm, faster.arm.arm) == ("none", "recurrent_.1"):
            steps = faster.steps
            ratio = Estimate(steps.ratio, steps.ci95, config.seeds)
            yield Published(
                quantity="steps of none over those of recurrent_.1",
                here=in_line(ratio, number),
                source="above 1 (pixels)",
                agrees=_above_1(steps) if config.read == "pixels" else None,
            )


def _above_1(steps: Ratio) -> bool | None:
    """None where the ratio is, but its interval is not: that may be chance."""
    if steps.ratio is None or steps.ratio <= 1:
        return False
    return True if (steps.ci95[0] or 0) > 1 else None


def _vanishing(config, norms):
    """Ratios of the gradient's norms; only pixels are judged, as rows are too few steps."""
    for arm, ends in norms.items():
        ratio = _reached(ends["start"])
        source, low, high = GRADIENTS.get(arm, (None, 0, math.inf))
        judged = source and config.read == "pixels" and ratio is not None
        yield Published(
            quantity=f"{arm}: gradient at the first step over the last, before training"
            + (f" (agrees: {low:g} to {high:g})" if judged else ""),
            here="-" if ratio is None else number(ratio),
            source=source,
            agrees=low <= ratio <= high if judged else None,
            reason=VANISHING_REASON if ratio is not None and ratio > 1 else None,
        )


def _reached(norms):
    first, last = norms[0], norms[-1]
    return first / last if first is not None and last else None


if __name__ == "__main__":
    flags.main(Config, "experiments.lstm")
