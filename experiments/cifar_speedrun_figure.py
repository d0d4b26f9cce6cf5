"""The accuracies that many short runs of every arm end with, as a table and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bn_jax.lab.report.plotting import GREY, SMALL, arm_styles, new_figure, tidy
from bn_jax.lab.report.text import estimate, number, padded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Test accuracy at the end of every run, by arm. Each at its own best point; a run that "
    "diverged counts as 0 %. The black mark is the mean with its 95 % interval, the dashed "
    "line the target. Arms that end too far to the left to be shown have their mean in words."
)
CURVES = (
    "Learning curves of each arm at its own best point. The line is the median over its runs, "
    "the band reaches from the lower to the upper quartile. Left against training steps, right "
    "against training time per run, without compilation and evaluation. The dashed line is "
    "the target. The accuracy axis is stretched towards 100 % where an arm comes near it."
)
FAR = 0.05  # so much below the best arm an arm is not drawn


def table(summary: dict) -> dict[str, Any]:
    """A row for each arm; a cell with an interval has two lines, one run has no interval.

    Args:
      summary: with `target` and `arms` of `bn_jax.lab.statistics.summarize`, each arm with
        `mean_accuracy` (`mean`, `ci95`) and `epochs_to_target` besides.
    """
    target = f"{100 * summary['target']['value']:.4g} %"
    return {
        "title": f"Accuracy, and how soon it is {target}",
        "header": [
            "arm", "learning rate", "mean test accuracy (%)", f"epochs to {target}",
            f"seconds to {target}", "runs that reached it", "runs diverged",
        ],
        "rows": [_row(arm) for arm in summary["arms"]],
    }  # fmt: skip


def accuracies(summary: dict) -> Figure:
    """A row of dots for each arm, and its mean.

    Args:
      summary: as of `table`, each arm with `accuracies`, one for each run.
    """
    arms = summary["arms"]
    styles, target = arm_styles(a["arm"] for a in summary["arms"]), summary["target"]["value"]
    figure = new_figure(height=0.9 + 0.42 * len(arms))
    ax = figure.subplots()
    far = max(arm["mean_accuracy"]["mean"] for arm in arms) - FAR
    near = [arm for arm in arms if arm["mean_accuracy"]["mean"] >= far]
    for place, arm in enumerate(arms):
        if arm in near:
            _draw(ax, place, arm, styles[arm["arm"]])
    low, high = _limits([a for arm in near for a in arm["accuracies"] if a >= far] + [target])
    for place, arm in enumerate(arms):
        if arm not in near:
            _name_far(ax, low, place, arm)
    ax.axvline(100 * target, color=GREY, linewidth=1, linestyle=(0, (6, 4)), zorder=0.5)
    tidy(ax, "test accuracy (%)")
    ax.set_xlim(low, high)
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
    return figure


def _row(arm: dict) -> list[str]:
    one = arm["seeds"] == 1

    def cell(value, form, middle="median"):
        shown = {"median": value[middle], "ci95": None if one else value["ci95"]}
        return estimate(shown, form, open_end="never", missing="never")

    return [
        arm["arm"],
        number(arm["learning_rate"]),
        cell(arm["mean_accuracy"], lambda v: f"{100 * v:.2f}", "mean"),
        cell(arm["epochs_to_target"], padded),
        cell(arm["seconds_to_target"], padded),
        f"{arm['reached']} of {arm['seeds']}",
        f"{arm['diverged']} of {arm['seeds']}",
    ]


def _draw(ax: Axes, place: int, arm: dict, style: Any) -> None:
    """The runs, beside each other in the order of their seeds; the mean over them."""
    runs = [100 * a for a in arm["accuracies"]]
    rows = [place + 0.3 * (i / max(len(runs) - 1, 1) - 0.5) for i in range(len(runs))]
    look = {"color": style.color, "alpha": 0.5, "markersize": 4, "markeredgewidth": 0}
    ax.plot(runs, rows, style.marker, linestyle="", **look)
    middle, (low, high) = arm["mean_accuracy"]["mean"], arm["mean_accuracy"]["ci95"]
    ends = [[100 * max(middle - low, 0)], [100 * max(high - middle, 0)]]
    ax.errorbar([100 * middle], [place], xerr=ends, color="black", marker="|", capsize=3)


def _name_far(ax: Axes, low: float, place: int, arm: dict) -> None:
    """The mean of an arm that is to the left of the axis."""
    ax.annotate(
        f"<- {100 * arm['mean_accuracy']['mean']:.1f} %", (low, place), xytext=(4, 0),
        textcoords="offset points", va="center", fontsize=SMALL, color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _limits(values: list[float]) -> tuple[float, float]:
    low, high = 100 * min(values), 100 * max(values)
    room = 0.05 * (high - low) or 0.1
    return low - room, high + room
