"""Accuracy and speed against the batch size."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from bn_jax.lab.crossed import draw_percent
from bn_jax.lab.report.plotting import (
    GREY,
    SMALL,
    Style,
    add_legend,
    arm_styles,
    new_figure,
    tidy,
)
from bn_jax.lab.report.text import whole
from bn_jax.lab.statistics.convergence import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY = (
    "Test accuracy against the batch size, all with as many examples. At the learning rate "
    "and momentum that are best on the validation set at each batch size. Medians over the "
    "seeds with 95 % intervals. In the grey strip: batches that the norm refuses."
)
SPEED = (
    "Examples per second in training, against the batch size. Summed over runs that are "
    "trained at once: what a sweep gets, and more than one run alone. Without compilation "
    "and evaluation."
)
STATISTICS = (
    "Two evaluations of the same networks. Filled: with the running statistics. Hollow: with "
    "the statistics of batches of the test set as large as those in training. Medians over "
    "the seeds with 95 % intervals."
)


@dataclasses.dataclass(frozen=True)
class Combination:
    """A norm at a batch size, at its best point; without runs where the norm refuses it.

    Attributes:
      test_accuracy: with running statistics, at the last step.
      batch_statistics: the same with those of batches; None for a norm without statistics.
    """

    norm: str
    batch_size: int
    learning_rate: float = 0.0
    momentum: float | None = None
    seeds: int = 0
    diverged: int = 0
    test_accuracy: Estimate | None = None
    batch_statistics: Estimate | None = None
    examples_per_second: float = 0.0

    @property
    def refused(self) -> bool:
        """Whether there are no runs."""
        return not self.seeds

    def to_json(self) -> dict[str, Any]:
        """Returns an entry of `combinations` of `summary.json`."""
        cell = {"norm": self.norm, "batch_size": self.batch_size, "refused": self.refused}
        if self.refused:
            return cell | {"batch_statistics": None}
        batches = self.batch_statistics and self.batch_statistics.to_json()
        tested = self.test_accuracy and self.test_accuracy.to_json()
        return cell | vars(self) | {"test_accuracy": tested, "batch_statistics": batches}


def accuracy_against_batch(combinations: list[Combination]) -> Figure:
    """A line for each norm."""
    figure = new_figure(height=3.9)
    refused = [c for c in combinations if c.refused]
    if refused:
        ax, strip = figure.subplots(2, 1, sharex=True, height_ratios=(1, 0.12))
        _refused(strip, refused, _styles(combinations))
        ax.tick_params(axis="x", length=0, labelbottom=False)
    else:
        ax = strip = figure.subplots()
    for norm, style in _styles(combinations).items():
        _draw(ax, _of(combinations, norm), "test_accuracy", label=norm, **style.line())
    tidy(ax, ylabel="test accuracy (%)")
    _batch_axis(strip, combinations)
    figure.set_layout_engine("constrained", hspace=0, h_pad=0.03)
    add_legend(figure, ax)
    return figure


def speed_against_batch(combinations: list[Combination]) -> Figure:
    """A line for each norm, both axes logarithmic."""
    figure = new_figure(height=3.6)
    ax = figure.subplots()
    for norm, style in _styles(combinations).items():
        own = _of(combinations, norm)
        speeds = [c.examples_per_second for c in own]
        ax.plot([c.batch_size for c in own], speeds, label=norm, **style.line())
    _speed_axis(ax, [c.examples_per_second for c in combinations if not c.refused])
    tidy(ax, ylabel="examples per second")
    _batch_axis(ax, combinations)
    add_legend(figure, ax)
    return figure


def two_evaluations(combinations: list[Combination]) -> Figure:
    """A panel for each norm that has running statistics."""
    styles = _styles(combinations)
    norms = list(dict.fromkeys(c.norm for c in combinations if c.batch_statistics))
    figure = new_figure(width=1.2 + 2.6 * len(norms), height=3.3)
    panels = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    for ax, norm in zip(panels, norms, strict=True):
        own, look = _of(combinations, norm), styles[norm].line()
        hollow = look | {"markerfacecolor": "white", "alpha": 0.75, "linewidth": 1}
        _draw(ax, own, "test_accuracy", **look)
        _draw(ax, own, "batch_statistics", **hollow)
        ax.set_title(norm, fontsize=10, loc="left")
        tidy(ax)
        _batch_axis(ax, combinations)
    panels[0].set_ylabel("test accuracy (%)")
    return figure


def _styles(combinations: list[Combination]) -> dict[str, Style]:
    norms = dict.fromkeys(c.norm for c in combinations)
    return arm_styles(norms)


def _of(combinations: list[Combination], norm: str) -> list[Combination]:
    """Those of the norm, by batch size, without the refused."""
    own = [c for c in combinations if c.norm == norm and not c.refused]
    return sorted(own, key=lambda c: c.batch_size)


def _draw(ax: Axes, own: list[Combination], measure: str, **look: Any) -> None:
    draw_percent(ax, [c.batch_size for c in own], [getattr(c, measure) for c in own], **look)


def _refused(strip: Axes, refused: list[Combination], styles: dict[str, Style]) -> None:
    norms = list(dict.fromkeys(c.norm for c in refused))
    for c in refused:
        style, row = styles[c.norm], -norms.index(c.norm)
        strip.plot(
            [c.batch_size], [row], style.marker, color=style.color, markerfacecolor="white"
        )
    strip.set_facecolor("#f0f0f0")
    strip.set_ylim(-len(norms), 1)
    strip.set_yticks([(1 - len(norms)) / 2], ["refused"])
    strip.tick_params(axis="y", length=0, labelsize=SMALL, color=GREY)
    strip.spines[:].set_visible(False)


def _speed_axis(ax: Axes, speeds: list[float]) -> None:
    """A log axis around these speeds, labelled at 1, 2, 5, 10, 20, ..."""
    low, high = min(speeds) / 1.2, max(speeds) * 1.2
    ticks = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_yticks(shown, list(map(whole, shown)))
    ax.minorticks_off()


def _batch_axis(ax: Axes, combinations: list[Combination]) -> None:
    sizes = sorted({c.batch_size for c in combinations})
    ax.set_xscale("log", base=2)
    ax.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
    shown = sizes if len(sizes) < 8 else sizes[::2]
    ax.set_xticks(shown, list(map(whole, shown)))
    ax.minorticks_off()
    ax.tick_params(axis="x", labelsize=SMALL, labelbottom=True)
    ax.set_xlabel("batch size")
