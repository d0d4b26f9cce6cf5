"""Points of the plane, and what networks make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bn_jax.report.plotting import SMALL, add_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[np.ndarray, np.ndarray]

CAPTION = (
    "The data, and decision regions of one run of every arm. First panel: the points to train "
    "on are filled, those to test on hollow. Others: the colour is the probability of class "
    "1; the line is where it is one half; the points are those to test on."
)
# A marker each, as colours alone do not tell them apart for everybody.
CLASSES = (("#0072B2", "o"), ("#D55E00", "^"))


def decision_regions(
    maps: dict[str, np.ndarray], side: np.ndarray, train: Points, test: Points
) -> Figure:
    """A panel of the data, and one for each arm.

    Args:
      maps: by arm the probability of class 1, `[n, n]`, rows along the second coordinate.
      side: the n coordinates of both axes.
      train, test: points `[m, 2]` and their labels, 0 or 1 `[m]`.
    """
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    # The data, of which there is more to see, in a panel as high as all of the others.
    wide = 1.2 * rows - 0.2
    figure = new_figure(width=1.55 * (wide + columns) + 0.2, height=1.75 * rows + 0.5)
    # Axes of equal aspect end up a little lower than the layout knows.
    figure.get_layout_engine().set(rect=(0, 0.02, 1, 0.98))
    places = figure.add_gridspec(rows, 1 + columns, width_ratios=[wide, *[1] * columns])
    data = figure.add_subplot(places[:, 0])
    _data(data, train, test)
    data.set(xlim=(side[0], side[-1]), ylim=(side[0], side[-1]))
    data.locator_params(nbins=4)
    for i, (name, probability) in enumerate(maps.items()):
        row, column = divmod(i, columns)
        ax = figure.add_subplot(places[row, 1 + column], sharex=data, sharey=data)
        ax.contourf(side, side, probability, np.linspace(0, 1, 21), cmap="RdBu_r", alpha=0.6)
        ax.contour(side, side, probability, [0.5], colors="black", linewidths=1)
        for own, (color, _) in zip(_by_class(test), CLASSES, strict=True):
            ax.plot(*own.T, ".", color=color, markersize=1.6)
        ax.set_title(name, fontsize=SMALL + 1)
        below = i + columns < len(maps)
        ax.tick_params(labelleft=column == 0, labelbottom=not below)
    for ax in figure.axes:
        ax.set_aspect("equal")
        ax.tick_params(labelsize=SMALL)
    add_legend(figure, data)
    return figure


def _data(ax: Axes, train: Points, test: Points) -> None:
    ax.set_title("the data", fontsize=SMALL + 1)
    for use, points, fill in (("to train on", train, "full"), ("to test on", test, "none")):
        for i, (own, (color, marker)) in enumerate(
            zip(_by_class(points), CLASSES, strict=True)
        ):
            look = {"color": color, "marker": marker, "fillstyle": fill, "linestyle": ""}
            ax.plot(*own.T, **look, markersize=2.4, markeredgewidth=0.5)
            # In the legend larger, to be told apart.
            ax.plot([], [], **look, markersize=4.5, label=f"class {i}, {len(own)} {use}")


def _by_class(points: Points) -> list[np.ndarray]:
    where, labels = points
    return [where[labels == i] for i in range(len(CLASSES))]
