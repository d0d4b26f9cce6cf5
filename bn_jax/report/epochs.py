"""Loss and accuracy in training and validation, by epoch and by wall time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bn_jax.report.plotting import Style, add_legend, arm_styles, new_figure, tidy
from bn_jax.report.points import same_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Loss and accuracy by epoch and by training time, of every run at its arm's best point. "
    "Solid: on the validation set, after the epoch. Dashed: in training, the mean over the "
    "batches of the epoch, with its dropout and augmentation. A run that stopped early ends "
    "where it stopped."
)


def epoch_curves(records: list[dict], summary: dict, steps_per_epoch: int) -> Figure:
    """Two rows, loss and accuracy, of two panels, by epoch and by seconds.

    Args:
      records: of runs that were evaluated once in an epoch.
      summary: of their comparison.
      steps_per_epoch: training steps.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(height=5.4)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for name, style in arm_styles(summary).items():
        arm = next(a for a in summary["arms"] if a["arm"] == name)
        runs = [r for r in records if same_point(r, arm)]
        for i, run in enumerate(runs):
            _draw_run(panels, run, steps_per_epoch, style, name if i == 0 else None)
    for row, label in zip(panels, ("cross-entropy (nats)", "accuracy (%)"), strict=True):
        for ax in row:
            tidy(ax)
        row[0].set_ylabel(label)
    for ax, label in zip(panels[1], ("epochs", "training time (s)"), strict=True):
        ax.set_xlabel(label)
        ax.set_xlim(left=0)
    panels[1, 0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    add_legend(figure, panels[0, 0])
    return figure


def _draw_run(
    panels: np.ndarray, run: dict, steps_per_epoch: int, style: Style, name: str | None
) -> None:
    """One run in all four panels; in the legend if it has a name."""
    end = run["steps"][-1] if run["stopped_at"] is None else run["stopped_at"]
    steps = np.array([s for s in run["steps"] if 0 < s <= end], float)
    shown = slice(1, 1 + len(steps))
    axes_x = (steps / steps_per_epoch, steps * run["seconds"]["per_step"])
    for row, metric, factor in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
        for ax, x in zip(row, axes_x, strict=True):
            for split in ("validation", "train"):
                y = factor * np.array(run[f"{split}_{metric}"][shown], float)
                _draw(ax, x, y, style, split, name)


def _draw(
    ax: Axes, x: np.ndarray, y: np.ndarray, style: Style, split: str, name: str | None
) -> None:
    """A line with few markers; None in the records is NaN here, and leaves a gap."""
    look = style.line() | {"linestyle": "-", "markevery": max(len(x) // 8, 1)}
    if split == "train":
        look |= {"linestyle": (0, (3, 2)), "marker": "", "linewidth": 1.0}
    label = None if name is None else f"{name}, {'training' if split == 'train' else split}"
    ax.plot(x, y, label=label, **look)
