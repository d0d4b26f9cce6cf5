"""Final accuracy over learning rate and initial scale, one map per arm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bn_jax.report.plotting import GREY, SMALL, accuracy_scale, new_figure
from bn_jax.report.points import all_rates, grid, lost, same_point, values
from bn_jax.report.text import finite, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


def heat_maps(summary: dict) -> Figure:
    """Median final test accuracy in per cent, rate by scale, one colour scale for all arms.

    Each arm at the momentum of its best point, which has a frame. A point of which half
    of the runs or more diverged is hatched.
    """
    from matplotlib.colors import FuncNorm

    rates, scales = all_rates(summary), values(grid(summary), "init_scale")
    maps = np.stack([_medians(summary, arm, rates, scales) for arm in summary["arms"]])
    forward, inverse, ticks = accuracy_scale(summary)
    best = np.nanmax(maps) if np.isfinite(maps).any() else 100
    norm = FuncNorm((forward, inverse), vmin=0, vmax=best)
    figure, axes = _panels(len(maps), len(scales))
    for ax, arm, medians in zip(axes, summary["arms"], maps, strict=True):
        image = _draw_map(ax, medians, norm)
        _mark_best(ax, arm, rates, scales)
    figure.supxlabel("learning rate", fontsize=10)
    figure.supylabel("initial scale", fontsize=10)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=25, pad=0.02)
    ticks = [tick for tick in ticks if tick < 0.99 * best] + [best]
    bar.set_ticks(ticks, labels=[number(tick) for tick in ticks])
    bar.minorticks_off()
    bar.set_label("final test accuracy (%)", fontsize=SMALL)
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


def _medians(summary: dict, arm: dict, rates: list[float], scales: list[float]) -> np.ndarray:
    """`[scale, rate]` in per cent; NaN where half of the runs or more diverged."""
    medians = np.full((len(scales), len(rates)), np.nan)
    for point in grid(summary):
        if same_point(point, arm, ("arm", "momentum")) and not lost(point):
            median = finite(point["final_accuracy"]["median"])
            if median is not None:
                medians[_place(point, rates, scales)] = 100 * median
    return medians


def _place(point: dict, rates: list[float], scales: list[float]) -> tuple[int, int]:
    return (
        int(np.argmin(np.abs(np.subtract(scales, point["init_scale"])))),
        int(np.argmin(np.abs(np.log(rates) - np.log(point["learning_rate"])))),
    )


def _draw_map(ax: Axes, medians: np.ndarray, norm: Normalize) -> AxesImage:
    # The hatch of the axes shows where the image has nothing.
    ax.patch.set(hatch="////", edgecolor="#bbbbbb", facecolor="white")
    image = ax.imshow(medians, cmap="cividis", norm=norm, origin="lower", aspect="auto")
    form = "{:.1f}" if medians.shape[1] <= 8 else "{:.0f}"
    for (row, column), value in np.ndenumerate(medians):
        if np.isfinite(value):
            ink = "white" if norm(value) < 0.55 else "black"
            ax.text(
                column, row, form.format(value), ha="center", va="center", color=ink, fontsize=7
            )
    return image


def _mark_best(ax: Axes, arm: dict, rates: list[float], scales: list[float]) -> None:
    """A frame around the best point, and the names of the axes' values."""
    row, column = _place(arm, rates, scales)
    x = np.array([-0.5, 0.5, 0.5, -0.5, -0.5]) + column
    y = np.array([-0.5, -0.5, 0.5, 0.5, -0.5]) + row
    ax.plot(x, y, color="#D55E00", linewidth=2, clip_on=False)
    ax.set_title(arm["arm"], fontsize=10, loc="left")
    every = -(-len(rates) // 8)
    ax.set_xticks(range(0, len(rates), every), [number(rate) for rate in rates[::every]])
    ax.set_yticks(range(len(scales)), [number(scale) for scale in scales])
    ax.tick_params(labelsize=7, color=GREY, length=2)
    ax.spines[:].set_visible(False)
