"""A table in Markdown, as GitHub and most others read it."""

from __future__ import annotations

from bn_jax.report.text import Wrong


def table(header: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right; lines of a cell stay lines.

    A cell that is `Wrong` is bold, with a cross.
    """
    ruler = [":--"] + ["--:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in (header, ruler, *rows))


def _cell(text: str) -> str:
    plain = text.replace("|", "\\|").replace("\n", "<br>")
    return f"**{plain}** ✗" if isinstance(text, Wrong) else plain
