"""Which points of the grid a summary has, and which of them a figure or a row is about.

A point is an arm at one learning rate, initial scale and momentum.
"""

from __future__ import annotations

import math

from bn_jax.report.text import number

COORDINATES = ("arm", "learning_rate", "init_scale", "momentum")


def same_point(a: dict, b: dict, coordinates: tuple[str, ...] = COORDINATES) -> bool:
    """Whether a and b (arms of a summary, or records) agree in these coordinates."""
    return all(_equal(a.get(c), b.get(c)) for c in coordinates)


def values(items: list[dict], coordinate: str) -> list[float]:
    """The values that a coordinate takes, ascending, each once, without null."""
    found: list[float] = []
    for value in sorted(i[coordinate] for i in items if i.get(coordinate) is not None):
        if not found or not _equal(value, found[-1]):
            found.append(value)
    return found


def varies(summary: dict, coordinate: str) -> bool:
    """Whether the grid has several values of it, so that a label has to name it."""
    return len(values(grid(summary), coordinate)) > 1


def grid(summary: dict) -> list[dict]:
    """Every arm at every point; at its best point alone where there is nothing else."""
    return summary.get("by_point") or summary["arms"]


def all_rates(summary: dict) -> list[float]:
    """The learning rates of the grid, ascending."""
    return values(grid(summary), "learning_rate")


def along_rates(summary: dict, best: dict) -> list[dict]:
    """The points of one arm at the initial scale and momentum of its best, by rate."""
    line = [p for p in grid(summary) if same_point(p, best, ("arm", "init_scale", "momentum"))]
    return sorted(line, key=lambda p: p["learning_rate"])


def lost(point: dict) -> bool:
    """Whether half of the runs or more diverged, so that a median says nothing of the rest."""
    return 2 * point["diverged"] >= point["seeds"]


def label(summary: dict, point: dict, separator: str = ", ") -> str:
    """ "rate 0.1", with the initial scale and the momentum where the grid varies them."""
    return separator.join([f"rate {number(point['learning_rate'])}", *others(summary, point)])


def others(summary: dict, point: dict) -> list[str]:
    """ "scale 2" and "momentum 0.9", each where the grid varies it."""
    return [
        f"{name} {number(point[coordinate])}"
        for name, coordinate in (("scale", "init_scale"), ("momentum", "momentum"))
        if point.get(coordinate) is not None and varies(summary, coordinate)
    ]


def _equal(a: object, b: object) -> bool:
    # A rate that went through float32 is still the same rate.
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
