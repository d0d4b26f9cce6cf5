"""What all figures share: one look per arm, axes of rates, the target."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Function = Callable[[np.ndarray], np.ndarray]

GREY, PALE = "#6b6b6b", "#f0f0f0"
DASHED = (0, (6, 4))
SMALL = 8.5


class Style(NamedTuple):
    """Colour, marker and dashes: each alone tells the arms apart."""

    color: str
    marker: str
    linestyle: str | tuple

    def line(self) -> dict:
        """Keywords of `Axes.plot` and `Axes.errorbar`."""
        return self._asdict() | {"linewidth": 1.5, "markersize": 4.5}


# Colours of Okabe & Ito 2008 ("Color universal design"), without the yellow, which is
# lost on white.
STYLES = {
    "none": Style("#000000", "o", (0, (5, 1.5))),
    "bn": Style("#0072B2", "s", "-"),
    "layer": Style("#D55E00", "^", (0, (4, 1.5, 1, 1.5))),
    "group": Style("#009E73", "D", (0, (1.2, 1.2))),
}
SPARE = (
    Style("#CC79A7", "v", (0, (6, 1, 1, 1, 1, 1))),
    Style("#E69F00", "P", (0, (8, 2))),
    Style("#56B4E9", "X", (0, (3, 2))),
    Style("#7F5539", "*", (0, (2, 1, 6, 1))),
)


def arm_styles(arms: Iterable[str]) -> dict[str, Style]:
    """The look of every arm; that of an arm without one of its own follows from its place."""
    names = list(dict.fromkeys(arms))
    free = (style for name, style in STYLES.items() if name not in names)
    spare = itertools.cycle((*SPARE, *free))
    return {name: STYLES.get(name) or next(spare) for name in names}


def new_figure(width: float = 6.4, height: float = 3.6) -> Figure:
    """A white figure, in inches, that no global state of pyplot knows of."""
    # Here, as nothing else needs matplotlib, and its import takes longer than `--help` may.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def tidy(ax: Axes, xlabel: str = "", ylabel: str = "") -> None:
    """Labels, a faint grid behind the data, and no frame where it carries nothing."""
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.set_axisbelow(True)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=SMALL, color=GREY)


def rate_axis(ax: Axes, rates: Sequence[float]) -> None:
    """A log axis with ticks at the rates of the grid, and room at both ends."""
    ax.set_xscale("log")
    ax.set_xlim(min(rates) / 1.6, max(rates) * 1.6)
    shown = rates if len(rates) <= 12 else rates[:: -(-len(rates) // 12)]
    ax.set_xticks(shown, [number(rate) for rate in shown])
    ax.minorticks_off()


def strip_axis(strip: Axes, rows: int, label: str) -> None:
    """A grey band with a row per arm, and a label in place of numbers."""
    strip.set_facecolor(PALE)
    strip.set_ylim(-rows, 1)
    strip.set_yticks([(1 - rows) / 2], [label])
    strip.tick_params(labelsize=SMALL, color=GREY)
    strip.tick_params(axis="y", length=0)
    strip.spines[:].set_visible(False)


def accuracy_axis(ax: Axes, comparison: Outcome) -> None:
    """0 to 100 %, with the room near 100 where the arms are told apart, and the target."""
    if comparison.is_accuracy:
        _percent_axis(ax, comparison)
    level = comparison.times * comparison.target.value
    ax.axhline(level, color=GREY, linewidth=1, linestyle=DASHED, zorder=1.5)


def _percent_axis(ax: Axes, comparison: Outcome) -> None:
    forward, inverse, ticks = accuracy_scale(comparison.near_best)
    ax.set_yscale("function", functions=(forward, inverse))
    ax.set_ylim(0, 100)
    ax.set_yticks(ticks)
    ax.minorticks_off()


def name_target(ax: Axes, comparison: Outcome) -> None:
    """The value of the target, to the right of its line."""
    level = comparison.times * comparison.target.value
    ax.annotate(
        f"target\n{level:.4g}" + " %" * comparison.is_accuracy,
        (1, level),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=SMALL,
        color=GREY,
    )


def accuracy_scale(near_100: bool) -> tuple[Function, Function, list[int]]:
    """A scale for per cent, its inverse, and ticks.

    Linear, or where an arm comes near 100 %, -log(101 - accuracy), on which halving the
    error is a step of nearly the same height from 20 % to 98 %.
    """
    if not near_100:
        return np.positive, np.positive, [0, 20, 40, 60, 80, 100]
    return (
        lambda accuracy: -np.log(101 - np.minimum(accuracy, 100)),
        lambda height: 101 - np.exp(-height),
        [0, 50, 80, 90, 95, 98, 100],
    )


def add_legend(figure: Figure, ax: Axes) -> None:
    """The labels of `ax` above the panels, where they hide nothing; small enough to fit."""
    handles, labels = ax.get_legend_handles_labels()
    if not labels:
        return

    def draw(size):
        return figure.legend(
            handles, labels, loc="outside upper left", frameon=False, fontsize=size,
            ncols=4 if max(map(len, labels)) <= 12 else 2, handlelength=3.4,
        )  # fmt: skip

    legend = draw(SMALL)
    # Hinted letters are up to 5 % wider at another resolution.
    excess = 1.05 * legend.get_window_extent().width / figure.bbox.width
    if excess > 1:
        legend.remove()
        draw(SMALL / excess)
