"""From records to tables, figures and one page; needs no accelerator and imports no jax."""

from bn_jax.report.figures import (
    accuracy_against_rate,
    captions,
    learning_curves,
    save_all,
    steps_against_rate,
)
from bn_jax.report.files import (
    append_record,
    open_records,
    read_records,
    rewrite_records,
    write_atomically,
)
from bn_jax.report.folder import write
from bn_jax.report.page import html_page
from bn_jax.report.sentences import speedup_lines
from bn_jax.report.tables import print_summary, published_rows, summary_rows, terminal_table
from bn_jax.report.text import Wrong

__all__ = [
    "Wrong",
    "accuracy_against_rate",
    "append_record",
    "captions",
    "html_page",
    "learning_curves",
    "open_records",
    "print_summary",
    "published_rows",
    "read_records",
    "rewrite_records",
    "save_all",
    "speedup_lines",
    "steps_against_rate",
    "summary_rows",
    "terminal_table",
    "write",
    "write_atomically",
]
