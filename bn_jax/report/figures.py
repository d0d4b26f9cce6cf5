"""The figures of a comparison; `captions` says what they show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bn_jax.report.curves import learning_curves
from bn_jax.report.heatmap import heat_maps
from bn_jax.report.plotting import (
    GREY,
    SMALL,
    Style,
    add_legend,
    apart,
    arm_styles,
    draw_target,
    new_figure,
    rate_axis,
    scaled,
    tidy,
)
from bn_jax.report.points import all_rates, along_rates, others, varies
from bn_jax.report.text import finite, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200  # 1440 pixels for the 720 that a page gives them


def save_all(records: list[dict], summary: dict, folder: str | Path) -> list[Path]:
    """Writes the three figures as PNG into `folder`; their paths, in the order of `captions`."""
    figures = {
        "learning_curves.png": learning_curves(records, summary),
        "steps_to_target.png": steps_against_rate(summary),
        "accuracy.png": accuracy_against_rate(summary),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        # Without the version of matplotlib, so that equal figures are equal files.
        figure.savefig(folder / name, dpi=DPI, metadata={"Software": None})
    return [folder / name for name in figures]


def steps_against_rate(summary: dict) -> Figure:
    """Median steps to the target against the learning rate, with the 95 % interval.

    Each arm at the initial scale and momentum of its best point. A rate at which the
    median run does not reach the target is a hollow marker in the strip at the top, with
    a cross in it where half of the runs or more diverged.
    """
    arms, budget = summary["arms"], summary["budget_steps"]
    figure = new_figure(height=4.2)
    strip, ax = figure.subplots(
        2, 1, sharex=True, height_ratios=(0.04 + 0.06 * len(arms), 1), gridspec_kw={"hspace": 0}
    )
    ends = [_draw_steps(ax, strip, summary, place) for place in range(len(arms))]
    tidy(ax, "learning rate", "steps to target")
    _step_axis(ax, [end for pair in ends for end in pair] or [1, budget])
    rate_axis(ax, all_rates(summary))
    _tidy_strip(strip, len(arms), f"not reached in\n{whole(budget)} steps")
    add_legend(figure, ax)
    return figure


def accuracy_against_rate(summary: dict) -> Figure:
    """Final test accuracy against the learning rate; heat maps where the scale varies too.

    Medians with 95 % intervals. A rate at which half of the runs or more have no final
    accuracy is a hollow marker at the bottom.
    """
    if varies(summary, "init_scale"):
        return heat_maps(summary)
    figure = new_figure()
    ax = figure.subplots()
    lost = [_draw_accuracy(ax, summary, place) for place in range(len(summary["arms"]))]
    tidy(ax, "learning rate", "final test accuracy (%)")
    draw_target(ax, summary)
    rate_axis(ax, all_rates(summary))
    ax.set_ylim(0, 102)
    if any(lost):
        ax.text(0.01, 0.06, "hollow: diverged", transform=ax.transAxes, fontsize=SMALL, color=GREY)
    add_legend(figure, ax)
    return figure


def _draw_steps(ax: Axes, strip: Axes, summary: dict, place: int) -> list[float]:
    """One arm into both panels; the least and the greatest of the numbers of steps."""
    arm, budget = summary["arms"][place], summary["budget_steps"]
    style = arm_styles(summary)[arm["arm"]]
    points = along_rates(summary, arm)
    rates = apart([p["learning_rate"] for p in points], place, len(summary["arms"]))
    # On a log axis, where reaching the target before the first step has no place.
    low, middle, high = (
        [max(v, 1.0) for v in row] for row in _estimates(points, "steps_to_target", 1, budget)
    )
    _draw_line(ax, rates, (low, middle, high), _arm_label(summary, arm), style)
    for rate, point, median in zip(rates, points, middle, strict=True):
        if finite(median) is None:
            _draw_hollow(strip, rate, -place, style, crossed=2 * point["diverged"] >= point["seeds"])
    known = [v for row in (low, high) for v in row if finite(v) is not None]
    return [min(known), max(known)] if known else []


def _draw_accuracy(ax: Axes, summary: dict, place: int) -> bool:
    """One arm; whether a rate of it has no final accuracy."""
    arm = summary["arms"][place]
    style = arm_styles(summary)[arm["arm"]]
    points = along_rates(summary, arm)
    rates = apart([p["learning_rate"] for p in points], place, len(summary["arms"]))
    rows = _estimates(points, "final_accuracy", 100, 1.0)
    _draw_line(ax, rates, rows, _arm_label(summary, arm), style)
    lost = [rate for rate, median in zip(rates, rows[1], strict=True) if finite(median) is None]
    for rate in lost:
        _draw_hollow(ax, rate, 0, style)
    return bool(lost)


def _estimates(points: list[dict], key: str, factor: float, top: float) -> tuple[list, list, list]:
    """Low end, median and high end, NaN without a median.

    An open end is drawn to the median below and to `top` above. One seed has no interval.
    """
    low, middle, high = [], [], []
    for point in points:
        value = point.get(key) or {}
        median = finite(value.get("median"))
        ends = value.get("ci95") if point["seeds"] > 1 else None
        lower, upper = ends or (median, median)
        middle.append(median)
        low.append(None if median is None else median if finite(lower) is None else lower)
        high.append(None if median is None else top if finite(upper) is None else upper)
    return scaled(low, factor), scaled(middle, factor), scaled(high, factor)


def _draw_line(ax: Axes, rates: list[float], rows: tuple, label: str, style: Style) -> None:
    low, middle, high = rows
    below = [max(m - v, 0.0) for m, v in zip(middle, low, strict=True)]
    above = [max(v - m, 0.0) for m, v in zip(middle, high, strict=True)]
    ax.errorbar(
        rates, middle, (below, above), label=label, capsize=2.5, elinewidth=1, **style.line()
    )


def _draw_hollow(ax: Axes, x: float, y: float, style: Style, crossed: bool = False) -> None:
    marker = {"color": style.color, "linestyle": "", "clip_on": False, "zorder": 3}
    ax.plot([x], [y], style.marker, markersize=6, markerfacecolor="white", **marker)
    if crossed:
        ax.plot([x], [y], "x", markersize=3.5, **marker)


def _step_axis(ax: Axes, ends: list[float]) -> None:
    """A log axis around these numbers of steps, labelled at 1, 2, 5, 10, 20, ..."""
    low, high = min(ends) / 1.3, max(ends) * 1.3
    ticks = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_yticks(shown, [whole(tick) for tick in shown])
    ax.minorticks_off()


def _tidy_strip(strip: Axes, rows: int, label: str) -> None:
    """A grey band with a row per arm, and a label in place of numbers."""
    strip.set_facecolor("#f0f0f0")
    strip.set_ylim(0.7 - rows, 0.7)
    strip.set_yticks([(1 - rows) / 2], [label], fontsize=SMALL)
    strip.tick_params(length=0)
    strip.tick_params(axis="x", which="both", length=0, labelbottom=False)
    strip.spines[:].set_visible(False)


def _arm_label(summary: dict, arm: dict) -> str:
    return ", ".join([arm["arm"], *others(summary, arm)])
