"""The figures of a comparison, with captions that say what they show.

Learning curves, and where the grid has several points what every learning rate gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.heatmap import heat_maps
from bn_jax.lab.report.plotting import (
    Style,
    accuracy_axis,
    add_legend,
    arm_styles,
    name_target,
    new_figure,
    rate_axis,
    strip_axis,
    tidy,
)
from bn_jax.lab.report.text import plural, whole
from bn_jax.lab.statistics import ArmResult, Record
from bn_jax.lab.statistics.convergence import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Record]
ROW = 0.06  # height of a row of hollow markers beside a panel of 1


def of_comparison(records: Records, comparison: Outcome) -> list[tuple[str, str, Figure]]:
    """Name of the file, caption and figure of each."""
    c, curves = comparison, learning_curves(records, comparison)
    found = [("learning_curves.png", _curves_caption(c), curves)]
    if comparison.has_grid:
        found += [
            ("steps_to_target.png", _steps_caption(c), steps_against_rate(c)),
            ("accuracy.png", _accuracy_caption(c), accuracy_against_rate(c)),
        ]
    return [(name, " ".join(caption.split()), figure) for name, caption, figure in found]


def learning_curves(records: Records, comparison: Outcome) -> Figure:
    """Test accuracy of each arm at its own best point, against steps and against seconds.

    Lines are medians over the runs, bands reach from quartile to quartile. A run counts
    as 0 % from where it diverged, so that failures lower the curve and never leave it.
    """
    figure = new_figure(height=3.8)
    styles = arm_styles(arm.arm for arm in comparison.arms)
    steps_panel, seconds_panel = figure.subplots(1, 2, sharey=True)
    for place, arm in enumerate(comparison.arms):
        if not (runs := arm.runs(records)):
            continue
        accuracy = [run.filled() for run in runs]
        quartiles = np.quantile(
            comparison.times * np.array(accuracy), (0.25, 0.5, 0.75), axis=0
        )
        steps, style = np.asarray(runs[0].steps, float), styles[arm.arm]
        _draw_curve(steps_panel, steps, quartiles, style, place)
        _draw_curve(
            seconds_panel,
            steps * np.median([run.seconds.per_step for run in runs]),
            quartiles,
            style,
            place,
        )
        lost = sum(run.diverged_at is not None for run in runs)
        count = plural(len(runs), "run") + (f", {lost} diverged" if lost else "")
        steps_panel.lines[-1].set_label(f"{arm.arm}, {comparison.label(arm)} ({count})")
    tidy(steps_panel, "training steps", f"test {comparison.unit}")
    steps_panel.xaxis.set_major_formatter("{x:,.0f}")
    tidy(seconds_panel, "training time per run (s)")
    for ax in (steps_panel, seconds_panel):
        accuracy_axis(ax, comparison)
        ax.set_xlim(left=0)
        ax.locator_params(axis="x", nbins=5)
    name_target(seconds_panel, comparison)
    add_legend(figure, steps_panel)
    return figure


def steps_against_rate(comparison: Outcome) -> Figure:
    """Median steps to the target against the learning rate, with the 95 % interval.

    Each arm at the initial scale and momentum of its best point. A rate at which the
    median run does not reach the target is a hollow marker in the strip at the top, with
    a cross in it where half of the runs or more diverged.
    """
    budget, arms = comparison.budget, len(comparison.arms)
    figure = new_figure(height=3.9)
    strip, ax = figure.subplots(2, 1, sharex=True, height_ratios=(ROW * (1 + arms), 1))
    # On a log axis, where reaching the target before the first step has no place.
    ends = [
        np.maximum([_ends(p.steps_to_target, budget) for p in line], 1).T
        for line in map(comparison.along_rates, comparison.arms)
    ]
    _draw_arms(ax, strip, comparison, ends)
    _step_axis(ax, np.concatenate([e.ravel() for e in ends]), budget)
    strip_axis(strip, arms, f"not reached in\n{whole(budget)} steps")
    strip.tick_params(axis="x", length=0, labelbottom=False)
    _finish(figure, ax, ax, comparison, "steps to target")
    return figure


def accuracy_against_rate(comparison: Outcome) -> Figure:
    """Final test accuracy against the learning rate; heat maps where the scale varies too.

    Medians with 95 % intervals. A rate at which half of the runs or more diverged is a
    hollow marker in the strip at the bottom.
    """
    if comparison.scales_vary:
        return heat_maps(comparison)
    lines, arms = [*map(comparison.along_rates, comparison.arms)], len(comparison.arms)
    figure = new_figure(height=3.6)
    if any(point.lost for line in lines for point in line):
        ax, strip = figure.subplots(2, 1, sharex=True, height_ratios=(1, ROW * (1 + arms)))
        strip_axis(strip, arms, "diverged")
        ax.tick_params(axis="x", length=0, labelbottom=False)
    else:
        ax = strip = figure.subplots()
    ends = [
        comparison.times
        * np.array([_ends(Estimate() if p.lost else p.final_accuracy, 1) for p in line]).T
        for line in lines
    ]
    _draw_arms(ax, strip, comparison, ends)
    accuracy_axis(ax, comparison)
    name_target(ax, comparison)
    _finish(figure, ax, strip, comparison, f"final test {comparison.unit}")
    return figure


def _draw_curve(
    ax: Axes, x: np.ndarray, quartiles: np.ndarray, style: Style, place: int
) -> None:
    low, middle, high = quartiles
    every = max(len(x) // 8, 1)
    # The markers of one arm between those of the others.
    markers = ((1 + 2 * place) * every // 8 % every, every)
    ax.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
    ax.plot(x, middle, markevery=markers, **style.line())


def _ends(estimate: Estimate, top: float) -> list[float]:
    """Low end, median, high end; NaN without a median.

    An open low end is at the median, an open high one at `top`; both of one run are at the
    median.
    """
    if (median := estimate.median) is None:
        return [np.nan] * 3
    low, high = estimate.interval or (median, median)
    return [median if low is None else low, median, top if high is None else high]


def _draw_arms(ax: Axes, strip: Axes, comparison: Outcome, ends: Sequence[np.ndarray]) -> None:
    """The estimates of each arm into `ax`, the points without one into `strip`."""
    styles = arm_styles(arm.arm for arm in comparison.arms)
    for place, (arm, (low, middle, high)) in enumerate(zip(comparison.arms, ends, strict=True)):
        style, points = styles[arm.arm], comparison.along_rates(arm)
        # By up to 4 % beside the rate, so that the arms do not hide each other.
        beside = 1.04 ** (place - (len(ends) - 1) / 2)
        rates = [beside * point.learning_rate for point in points]
        yerr = np.maximum((middle - low, high - middle), 0)
        name = ", ".join([arm.arm, *comparison.others(arm)])
        ax.errorbar(rates, middle, yerr, label=name, capsize=2.5, elinewidth=1, **style.line())
        for rate, point, median in zip(rates, points, middle, strict=True):
            if np.isnan(median):
                _draw_hollow(strip, rate, place, style, point)


def _draw_hollow(strip: Axes, rate: float, place: int, style: Style, point: ArmResult) -> None:
    marker = {"color": style.color, "linestyle": "", "clip_on": False, "zorder": 3}
    strip.plot([rate], [-place], style.marker, markersize=6, markerfacecolor="white", **marker)
    if point.lost:
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


def _finish(figure: Figure, ax: Axes, lowest: Axes, comparison: Outcome, ylabel: str) -> None:
    tidy(ax, ylabel=ylabel)
    lowest.set_xlabel("learning rate")
    rate_axis(ax, comparison.rates)
    figure.set_layout_engine("constrained", hspace=0, h_pad=0.03)
    add_legend(figure, ax)


def _curves_caption(comparison: Outcome) -> str:
    return f"""Learning curves of each arm at its own best point. The line is the median
        over its runs, the band reaches from the lower to the upper quartile. Left against
        training steps, right against training time per run, without compilation and
        evaluation. A run counts as 0 % from the step at which it diverged. The dashed line
        is the target. {_stretch(comparison, "accuracy axis")}"""


def _steps_caption(comparison: Outcome) -> str:
    return f"""Steps to the target at every learning rate{_fixed(comparison)}.
        {_medians(comparison)} A bar that ends at the budget of {whole(comparison.budget)}
        steps is open. Hollow markers in the grey strip: the median run does not reach the
        target; with a cross: half of the runs or more diverged. Arms are moved a little
        sideways so that they do not hide each other."""


def _accuracy_caption(comparison: Outcome) -> str:
    if comparison.scales_vary:
        return f"""Final test accuracy at every learning rate and initial scale. Medians over
            {_runs(comparison)} at each point, all arms on one colour scale. Framed: the arm's
            own best point. Hatched: half of the runs or more diverged.
            {_stretch(comparison, "colour scale")}"""
    return f"""Final test accuracy at every learning rate{_fixed(comparison)}.
        {_medians(comparison)} A run that diverged counts as 0 %; where half of the runs or
        more did, there is a hollow marker in a grey strip. The dashed line is the target.
        {_stretch(comparison, "accuracy axis")}"""


def _stretch(comparison: Outcome, what: str) -> str:
    return f"The {what} is stretched towards 100 %." if comparison.near_best else ""


def _fixed(comparison: Outcome) -> str:
    """Which slice of the grid is shown, where it has more than rates."""
    names = (("initial scale", "init_scale"), ("momentum", "momentum"))
    varied = [name for name, key in names if len(comparison.values(key)) > 1]
    return f", each arm at the {' and '.join(varied)} of its best point" if varied else ""


def _medians(comparison: Outcome) -> str:
    if max(arm.seeds for arm in comparison.arms) == 1:
        return "One run at each point, so no interval."
    return f"Medians over {_runs(comparison)} at each point, with their 95 % intervals."


def _runs(comparison: Outcome) -> str:
    counts = sorted({arm.seeds for arm in comparison.arms})
    last = plural(counts[-1], "run")
    return last if len(counts) == 1 else f"{counts[0]} to {last}"
