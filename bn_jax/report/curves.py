"""Learning curves: the median run of every arm and the spread around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bn_jax.report.plotting import (
    Style,
    accuracy_axis,
    add_legend,
    arm_styles,
    name_target,
    new_figure,
    tidy,
)
from bn_jax.report.points import label, same_point
from bn_jax.report.text import finite, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def learning_curves(records: list[dict], summary: dict) -> Figure:
    """Test accuracy of each arm at its own best point, against steps and against seconds.

    Lines are medians over the runs, bands reach from quartile to quartile. A run counts
    as 0 % from where it diverged, so that failures lower the curve and never leave it.
    """
    figure = new_figure(height=3.8)
    steps_panel, seconds_panel = figure.subplots(1, 2, sharey=True)
    for place, arm in enumerate(summary["arms"]):
        runs = [r for r in records if same_point(r, arm)]
        if not runs:
            continue
        style, quartiles = arm_styles(summary)[arm["arm"]], _quartiles(runs)
        steps = np.asarray(runs[0]["steps"], float)
        _draw(steps_panel, steps, quartiles, style, place)
        _draw(seconds_panel, steps * _seconds_per_step(runs), quartiles, style, place)
        steps_panel.lines[-1].set_label(_runs_label(summary, arm, runs))
    tidy(steps_panel, "training steps")
    steps_panel.xaxis.set_major_formatter("{x:,.0f}")
    tidy(seconds_panel, "training time per run (s)")
    for ax in (steps_panel, seconds_panel):
        accuracy_axis(ax, summary)
        ax.set_xlim(left=0)
        ax.locator_params(axis="x", nbins=5)
    steps_panel.set_ylabel("test accuracy (%)")
    name_target(seconds_panel, summary)
    add_legend(figure, steps_panel)
    return figure


def _quartiles(runs: list[dict]) -> np.ndarray:
    """Lower quartile, median and upper quartile in per cent, `[3, evaluations]`."""
    accuracy = [[finite(a) or 0.0 for a in run["test_accuracy"]] for run in runs]
    return np.quantile(100 * np.array(accuracy), (0.25, 0.5, 0.75), axis=0)


def _seconds_per_step(runs: list[dict]) -> float:
    """Median over the runs; NaN, which draws nothing, where no run was timed."""
    timed = [finite((run.get("seconds") or {}).get("per_step")) for run in runs]
    timed = [seconds for seconds in timed if seconds is not None]
    return float(np.median(timed)) if timed else float("nan")


def _draw(ax: Axes, x: np.ndarray, quartiles: np.ndarray, style: Style, place: int) -> None:
    low, middle, high = quartiles
    every = max(len(x) // 8, 1)
    # The markers of one arm between those of the others.
    markers = ((1 + 2 * place) * every // 8 % every, every)
    ax.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
    ax.plot(x, middle, markevery=markers, **style.line())


def _runs_label(summary: dict, arm: dict, runs: list[dict]) -> str:
    """ "none, rate 0.1 (5 runs, 1 diverged)"."""
    lost = sum(run["diverged_at"] is not None for run in runs)
    count = plural(len(runs), "run") + (f", {lost} diverged" if lost else "")
    return f"{arm['arm']}, {label(summary, arm)} ({count})"
