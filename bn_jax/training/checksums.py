"""SHA-256 of the files of a folder, kept in a file beside them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

CHECKSUMS = "checksums.json"
# Orbax writes these after all others. With any damage to them it restores the same state.
UNCHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write(folder: Path) -> None:
    """Leaves `checksums.json` in the folder, on the disk when this returns."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in UNCHECKED]
    sums = {p.relative_to(folder).as_posix(): _checksum(p) for p in files}
    with open(folder / CHECKSUMS, "x") as file:
        json.dump(sums, file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def fault(folder: Path) -> str | None:
    """What is wrong with the folder's files, in words that name the first one, or None.

    Raises:
      OSError: a file is there and cannot be read.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes()).items()
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} is not as it was written"
    for name, checksum in sums:
        try:
            if _checksum(folder / name) != checksum:
                return f"{name} is not as it was written"
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return f"{name} is missing"
    return None


def _checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
