"""What `experiments.recalibration` leaves: a table, a figure, a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from bn_jax.report import markup
from bn_jax.report.figures import save
from bn_jax.report.files import write_atomically
from bn_jax.report.plotting import SPARE, STYLES, Style, add_legend, new_figure, tidy
from bn_jax.report.tables import Rows, terminal_table
from bn_jax.report.text import number, percent, subject, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"last": "weights after training", "average": "average of the weights"}
LOOKS = dict(zip(NAMES, (STYLES["bn"], SPARE[0]), strict=True))
CAPTION = (
    "Left: the error of the statistics, root mean square over mean and standard deviation of "
    "all features, against the number of training images that they are of; the reference are "
    "those of all training images. Right: the test accuracy with them. Lines are medians over "
    "the seeds, bands reach from the lowest to the highest; dashed lines are the running "
    "statistics that training left."
)


def write(summary: dict, config: dict, folder: str | Path, question: str) -> None:
    """Writes summary.json, the figure and report.html, and prints the table and the path."""
    from rich.console import Console

    folder = Path(folder)
    text = json.dumps(summary, indent=2, allow_nan=False)
    write_atomically(folder / "summary.json", text + "\n")
    path = save(figure(summary), folder / "figures" / "recalibration.png")
    parts = [
        markup.heading(question),
        markup.paragraph(f"{subject(summary)}, {summary['seeds']} seeds."),
        markup.table("", *table(summary)),
        markup.figure(CAPTION, path),
        markup.section("Settings", markup.definitions(config["flags"])),
        markup.section("The command that repeats it", markup.code(config["command"])),
    ]
    page = folder / "report.html"
    write_atomically(page, markup.document(question, parts))
    Console(highlight=False).print(terminal_table(*table(summary)))
    print(page)


def table(summary: dict) -> Rows:
    """A row for each kind of weights and number of images."""
    header = ["weights", "statistics of", "error (std)", "test accuracy (%)"]
    return header, [
        [
            NAMES[arm["weights"]], _images(arm, summary),
            _spread(arm["statistics_error"], number), _spread(arm["test_accuracy"], percent),
        ]
        for arm in summary["arms"]
    ]  # fmt: skip


def _images(arm: dict, summary: dict) -> str:
    if not arm["images"]:
        return "training (running)"
    every = "all " if arm["images"] == summary["training_images"] else ""
    return f"{every}{whole(arm['images'])} images"


def _spread(value: dict, form) -> str:
    low, high = value["range"]
    return f"{form(value['median'])}\n[{form(low)}, {form(high)}]"


def figure(summary: dict) -> Figure:
    """Error of the statistics, and test accuracy, against images used."""
    drawn = new_figure(height=3.4)
    errors, accuracies = drawn.subplots(1, 2)
    for weights, look in LOOKS.items():
        arms = [a for a in summary["arms"] if a["weights"] == weights]
        _curve(errors, arms, "statistics_error", 1, look)
        _curve(accuracies, arms, "test_accuracy", 100, look)
        errors.lines[-1].set_label(NAMES[weights])
    tidy(errors, "images", "error of the statistics (std)")
    tidy(accuracies, "images", "test accuracy (%)")
    errors.set_yscale("log")
    add_legend(drawn, errors)
    return drawn


def _curve(ax: Axes, arms: list[dict], name: str, factor: float, look: Style) -> None:
    running, *measured = arms
    shown = [a for a in measured if a[name]["median"] > 0]
    images = [a["images"] for a in shown]
    low, high = zip(*(a[name]["range"] for a in shown), strict=True)
    level = factor * running[name]["median"]
    ax.axhline(level, color=look.color, linewidth=1, linestyle=(0, (4, 3)))
    band = ([factor * v for v in values] for values in (low, high))
    ax.fill_between(images, *band, color=look.color, alpha=0.18, linewidth=0)
    medians = [factor * a[name]["median"] for a in shown]
    ax.plot(images, medians, **look.line() | {"linestyle": "-"})
    ax.set_xscale("log")
