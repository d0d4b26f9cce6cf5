"""Tables and sentences on a terminal, or in a log file: ASCII, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from rich import table as rich_table
from rich.box import Box
from rich.console import Console
from rich.text import Text

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.sentences import speedup_lines
from bn_jax.lab.report.tables import Table, Wrong, own_tables, published_table, summary_table
from bn_jax.lab.report.text import subject

# A rule below the header and nothing else. ASCII, as a log file may be read, or written, in
# any encoding.
RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """What was asked, the tables and the sentences, on `console` or standard output.

    80 columns hold them; where a cell is wider than its share it is folded, never cut.
    """
    console = console or Console(highlight=False)
    if "speedup" in summary:
        comparison = Outcome.of(summary)
        console.print(Text(f"{comparison.headline}\n"))
        console.print(_table(_narrow(summary_table(comparison))))
        for line in speedup_lines(comparison):
            console.print(Text(f"\n{line}"))
    else:
        console.print(Text(subject(summary)))
    for table in (*own_tables(summary), published_table(summary)):
        if table:
            print_table(table, console)
    if spent := summary.get("seconds"):
        text = ", ".join(f"{k} {v:.1f} s" for k, v in spent.items())
        console.print(f"\nTime: {text}.", soft_wrap=True)


def print_table(table: Table, console: Console | None = None) -> None:
    """The title and the table: the first column to the left, the others to the right.

    A cell that is `Wrong` has a colour and an x after it.
    """
    console = console or Console(highlight=False)
    if table.title:
        console.print(Text(f"\n{table.title}"))
    console.print(_table(table))


def _table(table: Table) -> rich_table.Table:
    drawn = rich_table.Table(box=RULE, padding=0, show_edge=False)
    for i, title in enumerate(table.header):
        lines = (_wrapped(line) for line in title.split("\n"))
        justify = "right" if i else "left"
        drawn.add_column(
            Text("\n".join(lines)), justify=justify, overflow="fold", vertical="top"
        )
    for row in table.rows:
        drawn.add_row(
            *(Text(f"{c} x", "bold red") if isinstance(c, Wrong) else Text(c) for c in row)
        )
    return drawn


def _narrow(table: Table) -> Table:
    """Names of arms folded at their underscores, ranges of rates in two lines."""
    rows = [
        [_wrapped(arm.replace("_", "_ ")).replace("_ ", "_"),
         *(cell.replace(" to ", "\nto ") for cell in row)]
        for arm, *row in table.rows
    ]  # fmt: skip
    return Table(table.title, table.header, rows)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 9, break_long_words=False))
