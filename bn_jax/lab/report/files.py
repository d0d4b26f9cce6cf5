"""Files that survive a kill: written whole or not at all, or line by line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from io import FileIO
from pathlib import Path
from typing import Any

from bn_jax.errors import UserError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """`path` holds the content, text in UTF-8; or what it held before, if this fails.

    Raises:
      OSError: with the name of the file, also where a full disk is noticed while writing.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    # In the same folder, as os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _named(path):
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Removes what kills inside `write_atomically` left in the folder."""
    for left in folder.glob(".*.tmp"):
        if TEMPORARY.fullmatch(left.name):
            left.unlink()


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Raises:
      OSError: the file cannot be read.
      UserError: it holds something else, as one that was cut does; names the file.
    """
    found = _parse(Path(path).read_bytes())
    if found is None:
        raise UserError(
            f"{path} is cut or damaged, it holds no JSON object: put a copy back, or repeat "
            "the run with --overwrite"
        )
    return found


def open_records(path: str | Path) -> FileIO:
    """`path` opened for `append_record`, without the line that a kill may have cut off."""
    path = Path(path)
    if path.exists():
        _mend_end(path)
    # Without a buffer, of which a full disk would be noticed once more when it is closed.
    return open(path, "ab", buffering=0)


def rewrite_records(path: str | Path, records: list[dict]) -> FileIO:
    """`open_records`, of a file that now has these records and no others."""
    lines = (json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_atomically(path, "".join(lines))
    return open_records(path)


def append_record(file: FileIO | str | Path, record: dict) -> None:
    """One more line of JSON at the end of `file`, written when this returns.

    Args:
      file: a path, or what `open_records` returned for one.
      record: of strings, numbers, lists, dicts and None.

    Raises:
      ValueError: a number in the record is NaN or infinite, which JSON does not have;
        nothing is written then.
      OSError: with the name of the file.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    if isinstance(file, str | Path):
        with open_records(file) as opened:
            append_record(opened, record)
        return
    with _named(file.name):
        while line:
            line = line[file.write(line) :]


def read_records(path: str | Path) -> list[dict]:
    """The records of a file of JSON lines; a last line that a kill cut off is left out.

    Raises:
      UserError: any other line is not a JSON object; names the file and the line.
    """
    records = []
    for number, line in enumerate(_lines(path), start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif line.endswith(b"\n"):  # only the last line can be without
            raise UserError(
                f"{path}, line {number}: not a JSON object: {line[:60]!r}; delete that line"
            )
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


@contextlib.contextmanager
def _named(path: str | Path):
    """Gives an OSError from within, which for a full disk has no name, that of the file."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), str(path)) from e
