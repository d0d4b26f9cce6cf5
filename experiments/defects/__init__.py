"""What BatchNorm layers get wrong: small cases with a true value, and each package's own.

The data is made by NumPy, the true value is computed from it in float64, and a framework's
by its public functions. Each function `d1` to `d11` returns the cases of one defect; its
docstring is title and text of `docs/correctness.md`.
"""

from __future__ import annotations

import functools
import inspect
from typing import NamedTuple

from experiments.defects.arithmetic import d1, d2, d3, d4, d5
from experiments.defects.case import Answer, Case, answer, by_default
from experiments.defects.handling import d6, d7, d8, d11
from experiments.defects.peers import FRAMEWORKS, installed
from experiments.defects.population import d9, d10

__all__ = [
    "FRAMEWORKS",
    "Answer",
    "Case",
    "Defect",
    "answer",
    "by_default",
    "defects",
    "installed",
]


class Defect(NamedTuple):
    """Cases of one kind; `note` says where it comes from."""

    number: str
    title: str
    note: str
    cases: list[Case]


@functools.cache
def defects() -> list[Defect]:
    """D1 to D11."""
    found = []
    for build in (d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11):
        title, _, note = (inspect.getdoc(build) or "").partition("\n\n")
        found.append(Defect(build.__name__.upper(), title, note, build()))
    return found
