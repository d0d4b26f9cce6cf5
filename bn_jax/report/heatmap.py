"""Final accuracy over learning rate and initial scale, one map per arm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bn_jax.report.plotting import GREY, SMALL, new_figure, scaled
from bn_jax.report.points import all_rates, grid, same_point, values
from bn_jax.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


def heat_maps(summary: dict) -> Figure:
    """Median final test accuracy in per cent, rate by scale, one colour scale for all arms.

    Each arm at the momentum of its best point, which has a frame. A point without a
    median, as half of its runs or more have no final accuracy, is hatched.
    """
    rates, scales = all_rates(summary), values(grid(summary), "init_scale")
    arms = summary["arms"]
    columns = min(len(arms), 2)
    rows = -(-len(arms) // columns)
    figure = new_figure(height=0.7 + rows * (0.5 + 0.3 * len(scales)))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, arm in zip(axes, arms, strict=False):
        image = _draw_map(ax, _medians(summary, arm, rates, scales))
        _mark_best(ax, arm, rates, scales)
    for ax in axes[len(arms) :]:
        ax.set_visible(False)
    figure.supxlabel("learning rate", fontsize=10)
    figure.supylabel("initial scale", fontsize=10)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.05, aspect=25, pad=0.02)
    bar.set_label("final test accuracy (%)", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _medians(summary: dict, arm: dict, rates: list[float], scales: list[float]) -> np.ndarray:
    """`[scale, rate]` in per cent; NaN where there is no median."""
    medians = np.full((len(scales), len(rates)), np.nan)
    for point in grid(summary):
        if same_point(point, arm, ("arm", "momentum")):
            where = _place(point, rates, scales)
            medians[where] = scaled([point["final_accuracy"]["median"]], 100)[0]
    return medians


def _place(point: dict, rates: list[float], scales: list[float]) -> tuple[int, int]:
    return (
        int(np.argmin(np.abs(np.subtract(scales, point["init_scale"])))),
        int(np.argmin(np.abs(np.log(rates) - np.log(point["learning_rate"])))),
    )


def _draw_map(ax: Axes, medians: np.ndarray) -> AxesImage:
    # The hatch of the axes shows where the image has nothing.
    ax.patch.set(hatch="////", edgecolor="#bbbbbb", facecolor="white")
    image = ax.imshow(
        medians, cmap="cividis", vmin=0, vmax=100, origin="lower", aspect="auto"
    )
    for (row, column), value in np.ndenumerate(medians):
        if np.isfinite(value):
            ink = "white" if value < 55 else "black"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=7)
    return image


def _mark_best(ax: Axes, arm: dict, rates: list[float], scales: list[float]) -> None:
    """A frame around the best point, and the names of the axes' values."""
    row, column = _place(arm, rates, scales)
    x = np.array([-0.5, 0.5, 0.5, -0.5, -0.5]) + column
    y = np.array([-0.5, -0.5, 0.5, 0.5, -0.5]) + row
    ax.plot(x, y, color="#D55E00", linewidth=2, clip_on=False)
    ax.set_title(arm["arm"], fontsize=10, loc="left")
    ax.set_xticks(range(len(rates)), [number(rate) for rate in rates])
    ax.set_yticks(range(len(scales)), [number(scale) for scale in scales])
    ax.tick_params(labelsize=SMALL, color=GREY, length=2)
    ax.spines[:].set_visible(False)
