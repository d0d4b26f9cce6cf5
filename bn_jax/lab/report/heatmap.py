"""Final accuracy over learning rate and initial scale, one map per arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.plotting import GREY, SMALL, accuracy_scale, new_figure
from bn_jax.lab.report.text import number
from bn_jax.lab.statistics import ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def heat_maps(comparison: Outcome) -> Figure:
    """Median final test accuracy in per cent, rate by scale, one colour scale for all arms.

    Each arm at the momentum of its best point, which has a frame. A point of which half
    of the runs or more diverged is hatched.
    """
    # Delayed as in `plotting.new_figure`: `--help` does not wait for matplotlib.
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    rates, scales = comparison.rates, comparison.values("init_scale")
    maps = np.stack([_medians(comparison, arm, rates, scales) for arm in comparison.arms])
    forward, _, ticks = accuracy_scale(comparison.near_best)
    best = float(np.nanmax(maps)) if np.isfinite(maps).any() else 100.0
    worst = min(0.0, float(np.nanmin(maps))) if np.isfinite(maps).any() else 0.0
    low, high = forward(np.array([worst, best]))
    norm = Normalize(low, high)
    figure, axes = _panels(len(maps), len(scales))
    for ax, arm, medians in zip(axes, comparison.arms, maps, strict=True):
        # The hatch of the axes shows where the image has nothing.
        ax.patch.set(hatch="////", edgecolor="#bbbbbb", facecolor="white")
        heights = forward(medians)
        ax.imshow(heights, cmap="cividis", norm=norm, origin="lower", aspect="auto")
        _name_values(ax, medians, np.ma.filled(norm(heights), np.nan))
        _mark_best(ax, arm, rates, scales)
    figure.supxlabel("learning rate", fontsize=10)
    figure.supylabel("initial scale", fontsize=10)
    colors = ScalarMappable(norm, "cividis")
    bar = figure.colorbar(colors, ax=axes, fraction=0.05, aspect=25, pad=0.02)
    ticks = [tick for tick in ticks if tick < 0.99 * best] + [best]
    bar.set_ticks(list(forward(np.array(ticks))), labels=[number(tick) for tick in ticks])
    bar.minorticks_off()
    bar.set_label(f"final test {comparison.unit}", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _panels(count: int, scales: int) -> tuple[Figure, list[Axes]]:
    """Two in a row; the lowest of each column has the rates below it."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = new_figure(height=0.7 + rows * (0.5 + 0.27 * scales))
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[max(count - columns, 0) : count]:
        ax.tick_params(labelbottom=True)
    return figure, axes[:count]


def _medians(
    comparison: Outcome, arm: ArmResult, rates: Sequence[float], scales: Sequence[float]
) -> np.ndarray:
    """`[scale, rate]` in per cent; NaN where half of the runs or more diverged."""
    medians = np.full((len(scales), len(rates)), np.nan)
    for p in comparison.points:
        if (p.arm, p.momentum) == (arm.arm, arm.momentum) and not p.lost:
            place = scales.index(p.init_scale), rates.index(p.learning_rate)
            median = p.final_accuracy.median
            medians[place] = np.nan if median is None else comparison.times * median
    return medians


def _name_values(ax: Axes, medians: np.ndarray, brightness: np.ndarray) -> None:
    form = "{:.1f}" if medians.shape[1] <= 8 else "{:.0f}"
    for (row, column), value in np.ndenumerate(medians):
        if np.isfinite(value):
            ink = "white" if brightness[row, column] < 0.55 else "black"
            at = {"ha": "center", "va": "center", "color": ink, "fontsize": 7}
            ax.text(column, row, form.format(value), **at)


def _mark_best(
    ax: Axes, arm: ArmResult, rates: Sequence[float], scales: Sequence[float]
) -> None:
    """A frame around the best point, and the names of the axes' values."""
    row, column = scales.index(arm.init_scale), rates.index(arm.learning_rate)
    x = np.array([-0.5, 0.5, 0.5, -0.5, -0.5]) + column
    y = np.array([-0.5, -0.5, 0.5, 0.5, -0.5]) + row
    ax.plot(x, y, color="#D55E00", linewidth=2, clip_on=False)
    ax.set_title(arm.arm, fontsize=10, loc="left")
    every = -(-len(rates) // 8)
    ax.set_xticks(range(0, len(rates), every), [number(rate) for rate in rates[::every]])
    ax.set_yticks(range(len(scales)), [number(scale) for scale in scales])
    ax.tick_params(labelsize=7, color=GREY, length=2)
    ax.spines[:].set_visible(False)
