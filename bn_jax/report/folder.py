"""What a finished comparison leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from bn_jax.report.figures import captions, save_all
from bn_jax.report.files import write_atomically
from bn_jax.report.page import html_page


def write(
    records: list[dict], summary: dict, config: dict, folder: str | Path, question: str
) -> Path:
    """Writes config.json, summary.json, figures/*.png and report.html; the path of the last.

    Raises:
      ValueError: `summary` or `config` holds NaN or infinity, which JSON does not have.
    """
    folder = Path(folder)
    # The numbers first: they stay if a figure fails.
    for name, content in (("config.json", config), ("summary.json", summary)):
        text = json.dumps(content, indent=2, allow_nan=False)
        write_atomically(folder / name, text + "\n")
    paths = save_all(records, summary, folder / "figures")
    figures = list(zip(captions(summary), paths, strict=True))
    page = folder / "report.html"
    write_atomically(page, html_page(summary, config, figures, question))
    return page
