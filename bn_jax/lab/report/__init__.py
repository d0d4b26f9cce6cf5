"""From records to tables, figures and one page; needs no accelerator and imports no jax.

`page.write` fills the folder of a run, `terminal.print_summary` prints its tables. Here are
the files that survive a kill, which every command needs: they import nothing.
"""

from bn_jax.lab.report.files import (
    append_record,
    open_records,
    read_json,
    read_records,
    remove_unfinished,
    rewrite_records,
    write_atomically,
)

__all__ = [
    "append_record",
    "open_records",
    "read_json",
    "read_records",
    "remove_unfinished",
    "rewrite_records",
    "write_atomically",
]
