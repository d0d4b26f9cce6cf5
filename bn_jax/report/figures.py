"""The figures of a comparison as files, and the captions that say what they show."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from bn_jax.report.curves import learning_curves
from bn_jax.report.files import write_atomically
from bn_jax.report.plotting import stretched
from bn_jax.report.points import grid, varies
from bn_jax.report.rates import accuracy_against_rate, steps_against_rate
from bn_jax.report.text import plural, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_against_rate",
    "captions",
    "learning_curves",
    "save_all",
    "steps_against_rate",
]

DPI = 180  # 1150 pixels for the 640 that a page gives a figure


def save_all(records: list[dict], summary: dict, folder: str | Path) -> list[Path]:
    """Writes the figures into `folder` as PNG; paths in the order of `captions`.

    Where the grid has a single point there are only the learning curves.
    """
    figures = {"learning_curves.png": learning_curves(records, summary)}
    if _has_grid(summary):
        figures["steps_to_target.png"] = steps_against_rate(summary)
        figures["accuracy.png"] = accuracy_against_rate(summary)
    return [save(figure, Path(folder) / name) for name, figure in figures.items()]


def save(figure: Figure, path: Path) -> Path:
    """Writes the figure as PNG, with the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    # Without the version of matplotlib, so that equal figures are equal files.
    figure.savefig(png, dpi=DPI, metadata={"Software": None})
    write_atomically(path, png.getvalue())
    return path


def captions(summary: dict) -> list[str]:
    """What the figures of `save_all` show; the first sentence of each is its title."""
    texts = [_curves_caption(summary)]
    if _has_grid(summary):
        texts += [_steps_caption(summary), _accuracy_caption(summary)]
    return [" ".join(text.split()) for text in texts]


def _has_grid(summary: dict) -> bool:
    """Whether an arm was tried at several rates or scales."""
    points = {(p["arm"], p["learning_rate"], p["init_scale"]) for p in grid(summary)}
    return len(points) > len({arm for arm, *_ in points})


def _curves_caption(summary: dict) -> str:
    return f"""Learning curves of each arm at its own best point. The line is the median
        over its runs, the band reaches from the lower to the upper quartile. Left against
        training steps, right against training time per run, without compilation and
        evaluation. A run counts as 0 % from the step at which it diverged. The dashed line
        is the target. {_stretch(summary, "accuracy axis")}"""


def _steps_caption(summary: dict) -> str:
    return f"""Steps to the target at every learning rate{_fixed(summary)}. {_medians(summary)}
        A bar that ends at the budget of {whole(summary["budget_steps"])} steps is open.
        Hollow markers in the grey strip: the median run does not reach the target; with a
        cross: half of the runs or more diverged. Arms are moved a little sideways so that
        they do not hide each other."""


def _accuracy_caption(summary: dict) -> str:
    if varies(summary, "init_scale"):
        return f"""Final test accuracy at every learning rate and initial scale. Medians over
            {_runs(summary)} at each point, all arms on one colour scale. Framed: the arm's
            own best point. Hatched: half of the runs or more diverged.
            {_stretch(summary, "colour scale")}"""
    return f"""Final test accuracy at every learning rate{_fixed(summary)}. {_medians(summary)}
        A run that diverged counts as 0 %; where half of the runs or more did, there is a
        hollow marker in a grey strip. The dashed line is the target.
        {_stretch(summary, "accuracy axis")}"""


def _stretch(summary: dict, what: str) -> str:
    return f"The {what} is stretched towards 100 %." if stretched(summary) else ""


def _fixed(summary: dict) -> str:
    """Which slice of the grid is shown, where it has more than rates."""
    varied = [
        name
        for name, coordinate in (("initial scale", "init_scale"), ("momentum", "momentum"))
        if varies(summary, coordinate)
    ]
    return f", each arm at the {' and '.join(varied)} of its best point" if varied else ""


def _medians(summary: dict) -> str:
    if max(arm["seeds"] for arm in summary["arms"]) == 1:
        return "One run at each point, so no interval."
    return f"Medians over {_runs(summary)} at each point, with their 95 % intervals."


def _runs(summary: dict) -> str:
    counts = sorted({arm["seeds"] for arm in summary["arms"]})
    if len(counts) == 1:
        return plural(counts[0], "run")
    return f"{counts[0]} to {plural(counts[-1], 'run')}"
