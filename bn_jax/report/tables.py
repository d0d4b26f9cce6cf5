"""The table of arms, for the terminal and for the page."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from bn_jax.report.points import label
from bn_jax.report.sentences import speedup_lines
from bn_jax.report.text import (
    Format,
    Wrong,
    estimate,
    number,
    padded,
    percent,
    subject,
    target_text,
    whole,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Rows = tuple[list[str], list[list[str]]]
Columns = dict[str, Callable[[dict], str]]


def summary_rows(summary: dict) -> Rows:
    """Header and one row per arm at its own best point.

    A cell with an interval has two lines, "310" and "[290, 350]"; one seed has no interval.
    """
    before = {"arm": _name, "best learning rate": functools.partial(_best, summary)}
    after = {"rates that train": _trainable, "runs reached": _reached, "runs diverged": _lost}
    return _rows(summary["arms"], before | _measured(summary["budget_steps"]) | after)


def same_rate_rows(summary: dict) -> Rows | None:
    """The like at one learning rate for all arms; None where there is no such comparison."""
    same = summary.get("at_same_learning_rate")
    if not same:
        return None
    after = {"final test accuracy (%)": _final, "trains": _trains}
    after |= {"runs reached": _reached, "runs diverged": _lost}
    return _rows(same["arms"], {"arm": _name} | _measured(summary["budget_steps"]) | after)


def published_rows(summary: dict) -> Rows:
    """What a source published beside what was measured here; no rows where there is nothing.

    The last column is of `agrees`: true, false, or null where it was not judged, or nothing
    was published; a row that has none tells a setting.
    """
    said = {True: "yes", False: "no", None: ""}
    rows = [
        [r["quantity"], r["here"], r["source"] or "", said[r.get("agrees")]]
        for r in summary.get("published", ())
    ]
    return ["", "here", "published", "agrees"], rows


def print_summary(summary: dict, console: Console | None = None) -> None:
    """What was asked, the table and the sentences, on `console` or standard output.

    80 columns hold it; where a cell is wider than its share it is folded, never cut.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    console.print(Text(headline(summary)))
    console.print()
    header, rows = summary_rows(summary)
    broken = [[_folded(arm), *(c.replace(" to ", "\nto ") for c in row)] for arm, *row in rows]
    console.print(terminal_table(header, broken))
    for line in speedup_lines(summary):
        console.print()
        console.print(Text(line))
    if summary.get("published"):
        console.print()
        console.print(terminal_table(*published_rows(summary)))
    if summary.get("seconds"):
        spent = ", ".join(f"{k} {v:.1f} s" for k, v in summary["seconds"].items())
        console.print()
        console.print(f"Time: {spent}.", soft_wrap=True)


def _folded(name: str) -> str:
    """At its underscores, as a column of the terminal is narrow."""
    return "\n".join(textwrap.wrap(name.replace("_", "_ "), 9)).replace("_ ", "_")


def terminal_table(header: list[str], rows: list[list[str]]) -> Table:
    """For `Console.print`: the first column to the left, the others to the right.

    A cell that is `Wrong` has a colour and an x after it.
    """
    from rich.box import Box
    from rich.table import Table
    from rich.text import Text

    # ASCII, as a log file may be read, or written, in any encoding.
    rule = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    table = Table(box=rule, padding=0, show_edge=False)
    for i, title in enumerate(header):
        title = "\n".join(
            wrapped
            for line in title.split("\n")
            for wrapped in textwrap.wrap(line, 9, break_long_words=False)
        )
        table.add_column(
            Text(title), justify="right" if i else "left", overflow="fold", vertical="top"
        )
    for row in rows:
        table.add_row(
            *(Text(f"{c} x", "bold red") if isinstance(c, Wrong) else Text(c) for c in row)
        )
    return table


def headline(summary: dict) -> str:
    """ "digits, mlp. Target: test accuracy 95 % (given), within 1,500 steps"."""
    budget = whole(summary["budget_steps"])
    return f"{subject(summary)}. Target: {target_text(summary)}, within {budget} steps"


def _rows(arms: list[dict], columns: Columns) -> Rows:
    return list(columns), [[cell(arm) for cell in columns.values()] for arm in arms]


def _measured(budget: int) -> Columns:
    """The columns that hold a median and an interval."""
    steps = functools.partial(
        _estimate, "steps_to_target", whole, open_end=f">{whole(budget)}", missing="not reached"
    )
    seconds = functools.partial(
        _estimate, "seconds_to_target", padded, open_end="never", missing="not reached"
    )
    best = functools.partial(_estimate, "max_accuracy", percent)
    return {
        "steps to target": steps,
        "seconds to target": seconds,
        "best test accuracy (%)": best,
    }


def _estimate(
    key: str, form: Format, arm: dict, *, open_end: str = "-", missing: str = "-"
) -> str:
    value = dict(arm.get(key) or {})
    if arm["seeds"] == 1:  # the bootstrap of one run has no width, and would pass for certain
        value["ci95"] = None
    return estimate(value, form, open_end=open_end, missing=missing)


_final = functools.partial(_estimate, "final_accuracy", percent)


def _name(arm: dict) -> str:
    return arm["arm"]


def _best(summary: dict, arm: dict) -> str:
    return label(summary, arm, separator="\n").removeprefix("rate ")


def _trainable(arm: dict) -> str:
    rates = arm.get("trainable_learning_rates")
    if not rates:
        return "no rate"
    low, high = (number(rate) for rate in rates)
    return low if low == high else f"{low} to {high}"


def _trains(arm: dict) -> str:
    return "yes" if arm.get("trains") else "no"


def _reached(arm: dict) -> str:
    return f"{arm['reached']} of {arm['seeds']}"


def _lost(arm: dict) -> str:
    return f"{arm['diverged']} of {arm['seeds']}"
