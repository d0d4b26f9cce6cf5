"""What networks with two inputs make of the plane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bn_jax.report.plotting import SMALL, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Decision regions of one run of every arm. Colour: the probability of class 1; the line "
    "is where it is one half. Points: the test set."
)
COLORS = ("#0072B2", "#D55E00")


def decision_regions(
    maps: dict[str, np.ndarray], side: np.ndarray, points: np.ndarray, labels: np.ndarray
) -> Figure:
    """A panel for each arm.

    Args:
      maps: by arm the probability of class 1, `[n, n]`, rows along the second coordinate.
      side: the n coordinates of both axes.
      points, labels: `[m, 2]` and 0 or 1 `[m]`.
    """
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure = new_figure(width=2.1 * columns + 0.4, height=2.25 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, (name, probability) in zip(panels, maps.items(), strict=False):
        ax.contourf(side, side, probability, np.linspace(0, 1, 21), cmap="RdBu_r", alpha=0.6)
        ax.contour(side, side, probability, [0.5], colors="black", linewidths=1)
        for label, color in enumerate(COLORS):
            own = points[labels == label]
            ax.plot(*own.T, ".", color=color, markersize=1.6, label=f"class {label}")
        ax.set_title(name, fontsize=SMALL + 1)
        ax.set_aspect("equal")
        ax.tick_params(labelsize=SMALL)
    for ax in panels[len(maps) :]:
        ax.set_visible(False)
    return figure
