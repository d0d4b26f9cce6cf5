"""How much of the gradient reaches each step of a recurrent network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bn_jax.report.plotting import SMALL, add_legend, arm_styles, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Norm of the gradient of the loss with respect to the hidden state of each step, root mean "
    "square over one batch, of one run of every arm. Backpropagation goes from right to left. "
    "Left before the first training step, right after the last."
)
ENDS = {"start": "before training", "end": "after training"}


def gradients_through_time(
    norms: Mapping[str, Mapping[str, Sequence[float]]], summary: dict
) -> Figure:
    """A panel before training and one after.

    Args:
      norms: by arm and end (`start`, `end`) those of the steps, ascending.
      summary: whose arms give the colours.
    """
    figure, styles = new_figure(height=3.4), arm_styles(summary)
    panels = figure.subplots(1, 2, sharey=True)
    for ax, (end, title) in zip(panels, ENDS.items(), strict=True):
        for arm, ends in norms.items():
            values = np.array(ends[end], float)
            steps = np.arange(1, len(values) + 1)
            every = max(len(values) // 7, 1)
            values = np.where(values > 0, values, np.nan)
            ax.plot(steps, values, markevery=every, label=arm, **styles[arm].line())
        tidy(ax, "step of the sequence")
        ax.set_yscale("log")
        ax.set_title(title, fontsize=SMALL + 1)
    panels[0].set_ylabel("norm of the gradient")
    add_legend(figure, panels[0])
    return figure
