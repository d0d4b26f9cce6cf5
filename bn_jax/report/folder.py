"""What a finished comparison leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bn_jax.report.figures import captions, save, save_all
from bn_jax.report.files import write_atomically
from bn_jax.report.page import html_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(
    records: list[dict],
    summary: dict,
    config: dict,
    folder: str | Path,
    question: str,
    more: Sequence[tuple[str, str, Figure]] = (),
) -> Path:
    """Writes config.json, summary.json, figures and report.html; the path of the last.

    `figures/captions.json` has the caption of every file beside it.

    Args:
      records, summary, config, question: as in `html_page` and `save_all`.
      folder: of the run.
      more: figures beyond those of every comparison: name of the file, caption, figure.

    Raises:
      ValueError: `summary` or `config` holds NaN or infinity, which JSON does not have.
    """
    folder = Path(folder)
    # The numbers first: they stay if a figure fails.
    write_numbers(summary, config, folder)
    paths = save_all(records, summary, folder / "figures")
    figures = [*zip(captions(summary), paths, strict=True), *save_more(more, folder)]
    write_captions(figures)
    page = folder / "report.html"
    write_atomically(page, html_page(summary, config, figures, question))
    return page


def write_numbers(summary: dict, config: dict, folder: Path) -> None:
    """Writes config.json and summary.json."""
    for name, content in (("config.json", config), ("summary.json", summary)):
        text = json.dumps(content, indent=2, allow_nan=False)
        write_atomically(folder / name, text + "\n")


def save_more(figures: Sequence[tuple[str, str, Figure]], folder: Path) -> list:
    """Writes figures, (name, caption, figure) each; captions and paths."""
    return [(caption, save(f, folder / "figures" / name)) for name, caption, f in figures]


def write_captions(figures: Sequence[tuple[str, Path]]) -> None:
    """Beside the figures, (caption, path) each, what they show."""
    if figures:
        named = {path.name: caption for caption, path in figures}
        text = json.dumps(named, indent=2, ensure_ascii=False)
        write_atomically(figures[0][1].parent / "captions.json", text + "\n")
