"""What every learning rate gives: steps to the target, and final accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bn_jax.report.heatmap import heat_maps
from bn_jax.report.plotting import (
    GREY,
    SMALL,
    Style,
    accuracy_axis,
    add_legend,
    apart,
    arm_styles,
    name_target,
    new_figure,
    rate_axis,
    tidy,
)
from bn_jax.report.points import all_rates, along_rates, lost, others, varies
from bn_jax.report.text import finite, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def steps_against_rate(summary: dict) -> Figure:
    """Median steps to the target against the learning rate, with the 95 % interval.

    Each arm at the initial scale and momentum of its best point. A rate at which the
    median run does not reach the target is a hollow marker in the strip at the top, with
    a cross in it where half of the runs or more diverged.
    """
    budget = summary["budget_steps"]
    figure = new_figure(height=3.9)
    ratios = (_strip_height(summary), 1)
    strip, ax = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    steps = [_steps(along_rates(summary, arm), budget) for arm in summary["arms"]]
    _draw_arms(ax, strip, summary, steps)
    _step_axis(ax, np.concatenate([s.ravel() for s in steps]), budget)
    _strip_axis(strip, summary, f"not reached in\n{whole(budget)} steps")
    strip.tick_params(axis="x", length=0, labelbottom=False)
    _finish(figure, ax, ax, summary, "steps to target")
    return figure


def accuracy_against_rate(summary: dict) -> Figure:
    """Final test accuracy against the learning rate; heat maps where the scale varies too.

    Medians with 95 % intervals. A rate at which half of the runs or more diverged is a
    hollow marker in the strip at the bottom.
    """
    if varies(summary, "init_scale"):
        return heat_maps(summary)
    lines = [along_rates(summary, arm) for arm in summary["arms"]]
    figure = new_figure(height=3.6)
    if any(lost(point) for line in lines for point in line):
        ratios = (1, _strip_height(summary))
        ax, strip = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
        _strip_axis(strip, summary, "diverged")
        ax.tick_params(axis="x", length=0, labelbottom=False)
    else:
        ax = strip = figure.subplots()
    _draw_arms(ax, strip, summary, [_accuracies(line) for line in lines])
    accuracy_axis(ax, summary)
    name_target(ax, summary)
    _finish(figure, ax, strip, summary, "final test accuracy (%)")
    return figure


def _draw_arms(ax: Axes, strip: Axes, summary: dict, estimates: list[np.ndarray]) -> None:
    """The estimates of each arm into `ax`, the points without one into `strip`."""
    for place, (arm, (low, middle, high)) in enumerate(
        zip(summary["arms"], estimates, strict=True)
    ):
        style, points = arm_styles(summary)[arm["arm"]], along_rates(summary, arm)
        rates = apart([p["learning_rate"] for p in points], place, len(estimates))
        yerr = np.maximum((middle - low, high - middle), 0)
        name = ", ".join([arm["arm"], *others(summary, arm)])
        ax.errorbar(rates, middle, yerr, label=name, capsize=2.5, elinewidth=1, **style.line())
        for rate, point, median in zip(rates, points, middle, strict=True):
            if np.isnan(median):
                _draw_hollow(strip, rate, place, style, crossed=lost(point))


def _steps(points: list[dict], budget: int) -> np.ndarray:
    """Low end, median and high end, `[3, points]`; NaN where the median run does not reach."""
    rows = [_estimate(point, "steps_to_target", top=budget) for point in points]
    # On a log axis, where reaching the target before the first step has no place.
    return np.maximum(np.array(rows).reshape(-1, 3).T, 1)


def _accuracies(points: list[dict]) -> np.ndarray:
    """The like in per cent; NaN where half of the runs or more diverged."""
    rows = [
        [np.nan] * 3 if lost(point) else _estimate(point, "final_accuracy", top=1)
        for point in points
    ]
    return 100 * np.array(rows).reshape(-1, 3).T


def _estimate(point: dict, key: str, top: float) -> list[float]:
    """Low end, median, high end; an open low end is at the median, an open high one at `top`.

    One seed has no interval: both ends are at the median.
    """
    median = finite(point[key]["median"])
    if median is None:
        return [np.nan] * 3
    ends = point[key].get("ci95") if point["seeds"] > 1 else None
    low, high = (finite(end) for end in ends or (median, median))
    return [median if low is None else low, median, top if high is None else high]


def _draw_hollow(strip: Axes, rate: float, place: int, style: Style, crossed: bool) -> None:
    marker = {"color": style.color, "linestyle": "", "clip_on": False, "zorder": 3}
    strip.plot([rate], [-place], style.marker, markersize=6, markerfacecolor="white", **marker)
    if crossed:
        strip.plot([rate], [-place], "x", markersize=3.5, **marker)


def _step_axis(ax: Axes, steps: np.ndarray, budget: int) -> None:
    """A log axis around these numbers of steps, labelled at 1, 2, 5, 10, 20, ..."""
    known = steps[np.isfinite(steps)] if np.isfinite(steps).any() else [1, budget]
    low, high = min(known) / 1.3, max(known) * 1.3
    ticks = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_yticks(shown, [whole(tick) for tick in shown])
    ax.minorticks_off()


def _strip_height(summary: dict) -> float:
    """Of the strip, as a part of the panel beside it: a row per arm."""
    return 0.06 + 0.06 * len(summary["arms"])


def _strip_axis(strip: Axes, summary: dict, label: str) -> None:
    """A grey band with a row per arm, and a label in place of numbers."""
    rows = len(summary["arms"])
    strip.set_facecolor("#f0f0f0")
    strip.set_ylim(-rows, 1)
    strip.set_yticks([(1 - rows) / 2], [label])
    strip.tick_params(labelsize=SMALL, color=GREY)
    strip.tick_params(axis="y", length=0)
    strip.spines[:].set_visible(False)


def _finish(figure: Figure, ax: Axes, lowest: Axes, summary: dict, ylabel: str) -> None:
    tidy(ax, ylabel=ylabel)
    lowest.set_xlabel("learning rate")
    rate_axis(ax, all_rates(summary))
    figure.get_layout_engine().set(hspace=0, h_pad=0.03)
    add_legend(figure, ax)
