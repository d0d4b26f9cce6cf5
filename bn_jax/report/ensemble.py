"""The errors of several networks, and of the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bn_jax.report.plotting import SMALL, SPARE, STYLES, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Errors of the networks of the ensemble, each alone, and of the mean of the probabilities "
    "of the first 1, 2, 3 ... of them. Top-1: the most probable class is not the right one; "
    "top-5: nor are the four next."
)


def ensemble_errors(
    alone: Sequence[Sequence[float]], together: Sequence[Sequence[float]]
) -> Figure:
    """A panel for each of top-1 and top-5.

    Args:
      alone: by network its (top-1, top-5) error.
      together: at place k those of the first k + 1 networks together.
    """
    counts = range(1, len(alone) + 1)
    figure = new_figure(width=6.4, height=3.0)
    for k, (ax, name) in enumerate(zip(figure.subplots(1, 2), ("top-1", "top-5"), strict=True)):
        single = [100 * errors[k] for errors in alone]
        mean = [100 * errors[k] for errors in together]
        look = STYLES["bn"].line() | {"clip_on": False}
        cross = {"color": SPARE[1].color, "markersize": 7, "clip_on": False, "zorder": 3}
        ax.plot(counts, single, "x", **cross, label="each network alone")
        ax.plot(counts, mean, **look, label="the first so many together")
        tidy(ax, "networks", f"{name} error on the test set (%)")
        ax.set_xticks(counts)
        ax.set_ylim(0, 1.1 * max(*single, *mean, 1e-9))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=SMALL
    )
    return figure
