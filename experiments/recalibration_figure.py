"""What `experiments.recalibration` shows: a table and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bn_jax.lab.report.plotting import SPARE, STYLES, Style, add_legend, new_figure, tidy
from bn_jax.lab.report.tables import Table
from bn_jax.lab.report.text import number, percent, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"last": "weights after training", "average": "average of the weights"}
CAPTION = (
    "Left: the error of the statistics, root mean square over mean and standard deviation of "
    "all features, against the number of training images that they are of; the reference are "
    "those of all training images. Right: the test accuracy with them. Lines are medians over "
    "the seeds, bands reach from the lowest to the highest; dashed lines are the running "
    "statistics that training left."
)


def table(summary: dict[str, Any]) -> Table:
    """A row for each kind of weights and number of images."""

    def images(arm):
        if not arm["images"]:
            return "training (running)"
        every = "all " if arm["images"] == summary["training_images"] else ""
        return f"{every}{whole(arm['images'])} images"

    def spread(value, form):
        low, high = value["range"]
        return f"{form(value['median'])}\n[{form(low)}, {form(high)}]"

    return Table(
        f"Medians over {summary['seeds']} seeds, with the lowest and the highest",
        ["weights", "statistics of", "error (std)", "test accuracy (%)"],
        [
            [
                NAMES[arm["weights"]],
                images(arm),
                spread(arm["statistics_error"], number),
                spread(arm["test_accuracy"], percent),
            ]
            for arm in summary["arms"]
        ],
    )


def figure(found: list[dict[str, Any]]) -> Figure:
    """Error of the statistics, and test accuracy, against images used."""
    drawn = new_figure(height=3.4)
    errors, accuracies = drawn.subplots(1, 2)
    for (weights, name), look in zip(NAMES.items(), (STYLES["bn"], SPARE[0]), strict=True):
        own = [a for a in found if a["weights"] == weights]
        _curve(errors, own, "statistics_error", 1, look)
        _curve(accuracies, own, "test_accuracy", 100, look)
        errors.lines[-1].set_label(name)
    tidy(errors, "images", "error of the statistics (std)")
    tidy(accuracies, "images", "test accuracy (%)")
    errors.set_yscale("log")
    add_legend(drawn, errors)
    return drawn


def _curve(ax: Axes, found: list[dict], name: str, factor: float, look: Style) -> None:
    running, *measured = found
    shown = [a for a in measured if a[name]["median"] > 0]
    images = [a["images"] for a in shown]
    low, high = zip(*(a[name]["range"] for a in shown), strict=True)
    level = factor * running[name]["median"]
    ax.axhline(level, color=look.color, linewidth=1, linestyle=(0, (4, 3)))
    low, high = ([factor * v for v in values] for values in (low, high))
    ax.fill_between(images, low, high, color=look.color, alpha=0.18, linewidth=0)
    medians = [factor * a[name]["median"] for a in shown]
    style: dict[str, Any] = look.line() | {"linestyle": "-"}
    ax.plot(images, medians, **style)
    ax.set_xscale("log")
