"""Files that survive a kill: written whole or not at all, or line by line."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import TextIO


def write_atomically(path: str | Path, text: str) -> None:
    """`path` holds `text` in UTF-8, or, if this fails or is killed, what it held before."""
    path = Path(path)
    # In the same folder, as os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_records(path: str | Path) -> TextIO:
    """`path` opened for `append_record`, without the line that a kill may have cut off."""
    path = Path(path)
    if path.exists():
        _mend_end(path)
    return open(path, "a", encoding="utf-8", newline="\n")


def append_record(file: TextIO | str | Path, record: dict) -> None:
    """One more line of JSON at the end of `file`, flushed.

    Args:
      file: a path, or what `open_records` returned for one.
      record: of strings, numbers, lists, dicts and None.

    Raises:
      ValueError: a number in the record is NaN or infinite, which JSON does not have;
        nothing is written then.
    """
    line = json.dumps(record, allow_nan=False) + "\n"
    if isinstance(file, str | Path):
        with open_records(file) as opened:
            opened.write(line)
    else:
        file.write(line)
        file.flush()


def read_records(path: str | Path) -> list[dict]:
    """The records of a file of JSON lines; a last line that a kill cut off is left out.

    Raises:
      ValueError: any other line is not a JSON object; names the file and the line.
    """
    records = []
    for number, line in enumerate(_lines(path), start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif line.endswith(b"\n"):  # only the last line can be without
            raise ValueError(f"{path}, line {number}: not a JSON object: {line[:60]!r}")
    return records


def _lines(path: str | Path) -> list[bytes]:
    return Path(path).read_bytes().splitlines(keepends=True)


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:  # of JSON, or of UTF-8 cut within a character
        return None
    return record if isinstance(record, dict) else None


def _mend_end(path: Path) -> None:
    """Completes a last line that lacks only its end; removes one that lacks more."""
    lines = _lines(path)
    if not lines or lines[-1].endswith(b"\n"):
        return
    with open(path, "r+b") as file:
        if _parse(lines[-1]) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(path.stat().st_size - len(lines[-1]))
