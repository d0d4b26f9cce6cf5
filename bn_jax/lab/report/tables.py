"""The tables of a report, for the terminal, the page and Markdown alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.text import cell, number, padded, whole
from bn_jax.lab.statistics import ArmResult

MEASURED = ("steps to target", "seconds to target")
COUNTED = ("runs reached", "runs diverged")
SAID = {True: "yes", False: "no", None: ""}


class Wrong(str):
    """The text of a cell that is to stand out: every form of a table marks it in its way."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows below a header; the lines of a cell stay lines, the first cell names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns an entry of `tables` of `summary.json`."""
        return {"title": self.title, "header": [*self.header], "rows": [*map(list, self.rows)]}


def summary_table(comparison: Outcome) -> Table:
    """A row per arm at its own best point.

    A cell with an interval has two lines, "310" and "[290, 350]"; one seed has no interval.
    """
    best = f"best test {comparison.unit}"
    header = ["arm", "best learning rate", *MEASURED, best, "rates that train", *COUNTED]
    note = (
        "Median over seeds with the 95 % interval below it. The best learning rate of an arm "
        "is chosen on the validation set."
    )
    rows = _rows(header, comparison)
    return Table("Each arm at its own best learning rate", header, rows, note)


def same_rate_table(comparison: Outcome) -> Table | None:
    """The same table at the baseline's rate for all arms; None where that was not measured."""
    if not (same := comparison.same):
        return None
    measured = [f"{which} test {comparison.unit}" for which in ("best", "final")]
    header = ["arm", *MEASURED, *measured, "trains", *COUNTED]
    note = f"All arms at {comparison.same_label}, the baseline's best."
    return Table("All arms at the same learning rate", header, _rows(header, same), note)


def published_table(summary: Mapping[str, Any]) -> Table | None:
    """What a source published beside what was measured here; None where there is nothing.

    The last column is `agrees`: true, false, or null where it was not judged, or nothing
    was published; a row that has none tells a setting.
    """
    rows = [
        [r["quantity"], r["here"], r["source"] or "", SAID[r.get("agrees")]]
        for r in summary.get("published", ())
    ]
    title = "Beside the published numbers"
    return Table(title, ["", "here", "published", "agrees"], rows) if rows else None


def own_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The `tables` of an experiment's summary that have rows."""
    tables = (Table(t["title"], t["header"], t["rows"]) for t in summary.get("tables", ()))
    return [table for table in tables if table.rows]


def _rows(header: Sequence[str], comparison: Outcome) -> list[list[str]]:
    cells = (_cells(arm, comparison) for arm in comparison.arms)
    return [[row[name] for name in header] for row in cells]


def _cells(arm: ArmResult, comparison: Outcome) -> dict[str, str]:
    """The cells of an arm, by the name of the column."""
    late, lost = f">{whole(comparison.budget)}", "not reached"
    low, high = map(number, arm.trainable_learning_rates or (0, 0))
    rates = low if low == high else f"{low} to {high}"
    return {
        "arm": arm.arm,
        "best learning rate": "\n".join([number(arm.learning_rate), *comparison.others(arm)]),
        "steps to target": cell(arm.steps_to_target, whole, open_end=late, missing=lost),
        "seconds to target": cell(
            arm.seconds_to_target, padded, open_end="never", missing=lost
        ),
        f"best test {comparison.unit}": cell(arm.max_accuracy, comparison.value),
        f"final test {comparison.unit}": cell(arm.final_accuracy, comparison.value),
        "trains": SAID[arm.trains],
        "rates that train": rates if arm.trainable_learning_rates else "no rate",
        "runs reached": arm.count,
        "runs diverged": f"{arm.diverged} of {arm.seeds}",
    }
