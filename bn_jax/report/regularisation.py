"""Test accuracy and the gap to the training set, for norms, dropout and L2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bn_jax.report.plotting import add_legend, arm_styles, new_figure, tidy
from bn_jax.report.text import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Test accuracy, and by how much the accuracy on the training set is higher. A column for "
    "every weight of the L2 penalty. Medians over the seeds with 95 % intervals, at the "
    "learning rate that is best on the validation set. Norms are moved a little sideways so "
    "that they do not hide each other."
)
PANELS = {"test_accuracy": "test accuracy (%)", "gap": "training - test (%)"}


def accuracy_and_gap(combinations: list[dict]) -> Figure:
    """Against the dropout rate, a line for each norm.

    Args:
      combinations: with `norm`, `dropout`, `l2`, and an estimate (`median`, `ci95`) each of
        `test_accuracy` and `gap`.
    """
    l2s, norms, dropouts = (
        list(dict.fromkeys(c[k] for c in combinations)) for k in ("l2", "norm", "dropout")
    )
    styles = arm_styles({"arms": [{"arm": norm} for norm in norms]})
    found = {(c["norm"], c["dropout"], c["l2"]): c for c in combinations}
    figure = new_figure(width=1.2 + 2.0 * len(l2s), height=4.6)
    panels = figure.subplots(2, len(l2s), sharex=True, sharey="row", squeeze=False)
    for axes, (measure, label) in zip(panels, PANELS.items(), strict=True):
        for ax, l2 in zip(axes, l2s, strict=True):
            for i, norm in enumerate(norms):
                x = [j + 0.12 * (i - (len(norms) - 1) / 2) for j in range(len(dropouts))]
                values = [found[norm, dropout, l2][measure] for dropout in dropouts]
                _draw(ax, x, values, label=norm, **styles[norm].line())
            tidy(ax)
            ax.set_xticks(range(len(dropouts)), list(map(number, dropouts)))
        axes[0].set_ylabel(label)
    for top, bottom, l2 in zip(*panels, l2s, strict=True):
        top.set_title(f"L2 {number(l2)}", fontsize=10, loc="left")
        bottom.set_xlabel("dropout")
        bottom.set_xlim(-0.5, len(dropouts) - 0.5)
    add_legend(figure, panels[0, 0])
    return figure


def _draw(ax, x, values, **style):
    middle = [100 * v["median"] for v in values]
    ends = [[100 * end for end in v["ci95"]] for v in values]
    # Resampled medians lie around the median, which rounding may put a hair outside.
    low = [max(m - e[0], 0) for m, e in zip(middle, ends, strict=True)]
    high = [max(e[1] - m, 0) for m, e in zip(middle, ends, strict=True)]
    ax.errorbar(x, middle, (low, high), capsize=2.5, elinewidth=1, **style)
