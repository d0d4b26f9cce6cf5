"""The folder, the page and the tables of an experiment that crosses factors.

It has no baseline and no target, as `bn_jax.report.html_page` wants, but tables of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bn_jax.report import markup
from bn_jax.report.files import write_atomically
from bn_jax.report.folder import save_more, write_captions, write_numbers
from bn_jax.report.tables import published_rows, terminal_table
from bn_jax.report.text import subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

PUBLISHED = "Beside the published numbers"


def write(
    summary: dict, config: dict, folder: Path, figures: Sequence[tuple[str, str, Figure]]
) -> Path:
    """Writes config.json, summary.json, figures/*.png and report.html; the path of the last.

    Args:
      summary: its `question` is the title; `tables` and `published` are shown.
      config: of config.json.
      folder: of the run.
      figures: name of the file, caption, figure.

    Raises:
      ValueError: `summary` or `config` holds NaN or infinity, which JSON does not have.
    """
    # The numbers first: they stay if a figure fails.
    write_numbers(summary, config, folder)
    saved = save_more(figures, folder)
    write_captions(saved)
    page = folder / "report.html"
    write_atomically(page, html_page(summary, config, saved))
    return page


def html_page(summary: dict, config: dict, figures: list[tuple[str, Path]]) -> str:
    """The report as one file: figures embedded, no script, nothing loaded from elsewhere."""
    environment = {k: v for k, v in config.items() if k not in ("flags", "command")}
    tables = [
        markup.section(title, markup.table(title, header, rows))
        for title, header, rows in _tables(summary)
    ]
    parts = [
        markup.heading(summary["question"]),
        markup.paragraph(f"Measured on {subject(summary)}."),
        *tables[:1],
        markup.section("Figures", *(markup.figure(*figure) for figure in figures)),
        *tables[1:],
        markup.section("Settings", markup.definitions(config.get("flags") or {})),
        markup.section("Environment", markup.definitions(environment)),
        markup.section("The command that repeats it", markup.code(config.get("command") or "")),
    ]
    return markup.document(summary["question"], parts)


def print_summary(summary: dict, console: Console | None = None) -> None:
    """The tables, on `console` or standard output."""
    from rich.console import Console

    console = console or Console(highlight=False)
    console.print(subject(summary), markup=False)
    for title, header, rows in reversed(_tables(summary)):
        console.print(f"\n{title}", markup=False)
        console.print(terminal_table(header, rows))
    spent = ", ".join(f"{k} {v:.1f} s" for k, v in summary["seconds"].items())
    console.print(f"\nTime: {spent}.", soft_wrap=True)


def _tables(summary):
    """Title, header and rows of each, the published numbers first."""
    published = (PUBLISHED, *published_rows(summary))
    own = [(t["title"], t["header"], t["rows"]) for t in summary.get("tables", ())]
    return [table for table in (published, *own) if table[2]]
