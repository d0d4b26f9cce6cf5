"""Percentiles of what hidden units are given, as they change in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.plotting import GREY, SMALL, Style, arm_styles, new_figure, tidy
from bn_jax.lab.report.text import number
from bn_jax.lab.statistics import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TYPICAL = (
    "Input of a typical unit of the last hidden layer. The line is the median over test "
    "images, the band reaches from the 15th to the 85th percentile: the first seed of every "
    "arm at its own best point, with running statistics. Typical is the unit of median drift. "
    "Drift is the root mean square distance of the three percentiles from their means over "
    "training, in units of the mean distance from the 15th to the 85th."
)


class Paths(NamedTuple):
    """Of one run of an arm.

    Attributes:
      steps: of the evaluations, `[evaluations]`.
      percentiles: a low one, the median and a high one, `[evaluations, 3, units]`.
      drift: of every unit, `[units]`.
      typical: the number of the unit that stands for all.
    """

    steps: np.ndarray
    percentiles: np.ndarray
    drift: np.ndarray
    typical: int


def typical_units(summary: Summary, paths: Mapping[str, Paths]) -> Figure:
    """A panel for each arm: the percentiles of its typical unit against steps."""
    comparison = Outcome(**vars(summary))
    styles = arm_styles(arm.arm for arm in comparison.arms)
    columns = min(len(paths), 2)
    rows = -(-len(paths) // columns)
    figure = new_figure(height=0.5 + 2.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, arm in zip(panels, comparison.arms, strict=False):
        run = paths[arm.arm]
        _draw(ax, run.steps, run.percentiles[:, :, run.typical], styles[arm.arm])
        tidy(ax, "training steps")
        ax.set_xlim(left=0)
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        drift = number(run.drift[run.typical])
        ax.set_title(
            f"{arm.arm}, {comparison.label(arm)}: unit {run.typical}, drift {drift}",
            fontsize=SMALL + 1, loc="left",
        )  # fmt: skip
    for ax in panels[::columns]:
        ax.set_ylabel("input of the unit")
    for ax in panels[len(paths) :]:
        ax.set_visible(False)
    return figure


def all_units(summary: Summary, paths: Mapping[str, Paths]) -> Figure:
    """A cell for each unit, the unit of least drift first, in rows; arms side by side.

    Each unit is centred on the mean of its median, and divided by the mean distance of its
    percentiles, so that what is seen is what `drift` measures. The typical unit has a frame.
    """
    comparison = Outcome(**vars(summary))
    styles = arm_styles(arm.arm for arm in comparison.arms)
    height = cell_height(paths)
    columns = min(len(paths), 2)
    rows = -(-len(paths) // columns)
    figure = new_figure(width=3.2 * columns, height=3.55 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, arm in zip(panels, comparison.arms, strict=False):
        _draw_cells(ax, paths[arm.arm], height, styles[arm.arm])
        ax.set_title(f"{arm.arm}, {comparison.label(arm)}", fontsize=SMALL + 1, loc="left")
    for ax in panels[len(paths) :]:
        ax.set_visible(False)
    return figure


def all_units_caption(paths: Mapping[str, Paths]) -> str:
    """What `all_units` shows."""
    height = cell_height(paths)
    return (
        "Inputs of all units of the last hidden layer, in the same runs, the steadiest first. "
        "A cell has the median and the band against steps, centred, in the unit of drift: it "
        f"is {height} mean distances from the 15th to the 85th percentile high. The typical "
        "unit has a frame."
    )


def cell_height(paths: Mapping[str, Paths]) -> int:
    """Of a cell of `all_units`, in mean distances of the percentiles: what holds 99 %."""
    scaled = np.concatenate([np.abs(_scaled(run)).ravel() for run in paths.values()])
    return max(1, int(np.ceil(2 * np.quantile(scaled[np.isfinite(scaled)], 0.99))))


def _scaled(run: Paths) -> np.ndarray:
    """Percentiles centred on the median's mean, over their mean distance."""
    low, middle, high = np.moveaxis(run.percentiles, 1, 0)
    distance = (high - low).mean(0)
    distance = np.where(distance > 0, distance, np.nan)
    return (run.percentiles - middle.mean(0)) / distance


def _draw_cells(ax: Axes, run: Paths, height: int, style: Style) -> None:
    side = int(np.ceil(np.sqrt(run.drift.size)))
    scaled = np.clip(_scaled(run) / height, -0.5, 0.5)
    steps = 0.06 + 0.88 * run.steps / run.steps[-1]
    for place, unit in enumerate(np.argsort(run.drift, kind="stable")):
        row, column = divmod(place, side)
        # Rows go downwards, percentiles upwards.
        lines = row + 0.5 - 0.88 * scaled[:, :, unit]
        _draw(ax, column + steps, lines, style, width=0.7)
        if unit == run.typical:
            x = column + np.array([0, 1, 1, 0, 0])
            y = row + np.array([0, 0, 1, 1, 0])
            ax.plot(x, y, color="#D55E00", linewidth=1.5, zorder=3, clip_on=False)
    rows = -(-run.drift.size // side)
    ax.set(xlim=(0, side), ylim=(rows, 0), xticks=[], yticks=[], aspect="equal")
    ax.hlines(range(1, rows), 0, side, color="#dddddd", linewidth=0.6)
    ax.vlines(range(1, side), 0, rows, color="#dddddd", linewidth=0.6)
    ax.spines[:].set(color=GREY, linewidth=0.6)


def _draw(ax: Axes, x: np.ndarray, lines: np.ndarray, style: Style, width: float = 1.5) -> None:
    """The median as a line in the band from the low to the high percentile."""
    low, middle, high = lines.T
    ax.fill_between(x, low, high, color=style.color, alpha=0.25, linewidth=0)
    ax.plot(x, middle, color=style.color, linewidth=width)
