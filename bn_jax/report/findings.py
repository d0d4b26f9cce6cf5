"""The findings of `bn_jax.surgery.diagnose` as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_findings(findings: Sequence[Any], console: Console | None = None) -> None:
    """A row for each finding, in their order, on `console` or standard output.

    Args:
      findings: what `diagnose` returns.
      console: where to; 80 columns will do, cells that are wider are folded.
    """
    from rich.box import ASCII2
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    # ASCII, as a log file may be read, or written, in any encoding.
    table = Table(box=ASCII2, show_lines=True)
    for title in ("finding, layer", "figure", "limit", "what it is, and what to do"):
        right = title in ("figure", "limit")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for f in findings:
        layer = "/".join(map(str, f.path)) or "the model itself"
        cells = (f"{f.kind}\n{layer}", f"{f.figure:.3g}", f"{f.threshold:.3g}")
        table.add_row(*map(Text, (*cells, f"{f.meaning}\n-> {f.remedy}")))
    console.print(table if findings else "Nothing found.")
