"""The accuracies that many short runs of every arm end with, as a table and a figure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from bn_jax.lab.report.plotting import GREY, SMALL, arm_styles, new_figure, tidy
from bn_jax.lab.report.tables import Table
from bn_jax.lab.report.text import cell, number, padded
from bn_jax.lab.statistics import ArmResult
from bn_jax.lab.statistics.convergence import Estimate

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


@dataclasses.dataclass(frozen=True)
class Measured:
    """An arm at its best point.

    Attributes:
      result: of the comparison.
      accuracies: at the end of every run; 0 where it diverged.
      mean_accuracy: their mean, and its interval.
      epochs: of a run.
      epochs_to_target, run_seconds: of the runs.
    """

    result: ArmResult
    accuracies: list[float]
    mean_accuracy: Estimate
    epochs: float
    epochs_to_target: Estimate
    run_seconds: Estimate

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return self.mean_accuracy.median or 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns an entry of `arms` of `summary.json`."""
        return self.result.to_json() | {
            "accuracies": self.accuracies,
            "mean_accuracy": {"mean": self.mean, "ci95": list(self.mean_accuracy.ci95)},
            "epochs": self.epochs,
            "epochs_to_target": self.epochs_to_target.to_json(),
            "run_seconds": self.run_seconds.to_json(),
        }


def table(arms: list[Measured], target: float) -> Table:
    """A row for each arm; a cell with an interval has two lines, one run has no interval."""
    goal = f"{100 * target:.4g} %"
    header = ["arm", "learning rate", "mean test accuracy (%)", f"epochs to {goal}"]
    header += [f"seconds to {goal}", "runs that reached it", "runs diverged"]
    return Table(f"Accuracy, and how soon it is {goal}", header, [_row(arm) for arm in arms])


def accuracies(arms: list[Measured], target: float) -> Figure:
    """A row of dots for each arm, and its mean."""
    styles = arm_styles(arm.result.arm for arm in arms)
    figure = new_figure(height=0.9 + 0.42 * len(arms))
    ax = figure.subplots()
    far = max(arm.mean for arm in arms) - FAR
    near = [arm for arm in arms if arm.mean >= far]
    for place, arm in enumerate(arms):
        if arm in near:
            _draw(ax, place, arm, styles[arm.result.arm])
    low, high = _limits([a for arm in near for a in arm.accuracies if a >= far] + [target])
    for place, arm in enumerate(arms):
        if arm not in near:
            _name_far(ax, low, place, arm)
    ax.axvline(100 * target, color=GREY, linewidth=1, linestyle=(0, (6, 4)), zorder=0.5)
    tidy(ax, "test accuracy (%)")
    ax.set_xlim(low, high)
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_yticks(range(len(arms)), [arm.result.arm for arm in arms])
    return figure


def _row(arm: Measured) -> list[str]:
    never: dict[str, str] = {"open_end": "never", "missing": "never"}
    return [
        arm.result.arm,
        number(arm.result.learning_rate),
        cell(arm.mean_accuracy, lambda v: f"{100 * v:.2f}"),
        cell(arm.epochs_to_target, padded, **never),
        cell(arm.result.seconds_to_target, padded, **never),
        arm.result.count,
        f"{arm.result.diverged} of {arm.result.seeds}",
    ]


def _draw(ax: Axes, place: int, arm: Measured, style: Any) -> None:
    """The runs, beside each other in the order of their seeds; the mean over them."""
    runs = [100 * a for a in arm.accuracies]
    rows = [place + 0.3 * (i / max(len(runs) - 1, 1) - 0.5) for i in range(len(runs))]
    look = {"color": style.color, "alpha": 0.5, "markersize": 4, "markeredgewidth": 0}
    ax.plot(runs, rows, style.marker, linestyle="", **look)
    low, high = (end or 0 for end in arm.mean_accuracy.ci95)
    middle = arm.mean
    ends = [[100 * max(middle - low, 0)], [100 * max(high - middle, 0)]]
    ax.errorbar([100 * middle], [place], xerr=ends, color="black", marker="|", capsize=3)


def _name_far(ax: Axes, low: float, place: int, arm: Measured) -> None:
    """The mean of an arm that is to the left of the axis."""
    ax.annotate(
        f"<- {100 * arm.mean:.1f} %", (low, place), xytext=(4, 0),
        textcoords="offset points", va="center", fontsize=SMALL, color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _limits(values: list[float]) -> tuple[float, float]:
    low, high = 100 * min(values), 100 * max(values)
    room = 0.05 * (high - low) or 0.1
    return low - room, high + room
