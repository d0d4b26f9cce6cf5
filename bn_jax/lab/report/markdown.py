"""Tables and sections in Markdown, as GitHub and most others read it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bn_jax.lab.report.tables import Wrong


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right; lines of a cell stay lines.

    A cell that is `Wrong` is bold, with a cross.
    """
    ruler = [":--"] + ["--:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in (header, ruler, *rows))


def sections(page: str) -> dict[str, str]:
    """What stands below each heading of the second level, by the heading."""
    parts = re.split(r"^## (.*)\n", page, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _cell(text: str) -> str:
    plain = text.replace("|", "\\|").replace("\n", "<br>")
    return f"**{plain}** ✗" if isinstance(text, Wrong) else plain
