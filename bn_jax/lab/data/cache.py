"""Decoded arrays on disk: written once, mapped into memory afterwards.

A folder per dataset holds one `.npy` file per array, and `meta.json` with everything else
and checksums (CRC-32) of the files and of itself. It is filled under a temporary name and
renamed, so that a folder that exists is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import urllib.parse
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bn_jax.errors import UserError, expanded
from bn_jax.lab.data.arrays import Arrays

DIGITS = 12  # of the fingerprint's digest in a folder's name
ARRAYS = ("train_inputs", "train_labels", "test_inputs", "test_labels")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/bn_jax`, by default `~/.cache/bn_jax`."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cache_dir") / "bn_jax"


def cached(name: str, fingerprint: str, cache_dir: Path, build: Callable[[], Arrays]) -> Arrays:
    """The arrays of `build()`, from the cache where it has them.

    Args:
      name: of the dataset, for the folder's name.
      fingerprint: text that changes when `build` would return something else.
      cache_dir: created where it is missing.
      build: makes the arrays.

    Raises:
      UserError: a file in the cache is damaged.
      OSError: the cache cannot be written, the disk being full among the reasons.
    """
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:DIGITS]
    folder = cache_dir / f"{_quoted(name)}-{digest}"
    if not folder.exists():
        _write(folder, build)
    return mapped(folder)


def newest(name: str, cache_dir: Path) -> Path | None:
    """The folder that was last filled with arrays of that name, whatever they were made of."""
    ours = re.compile(f"{re.escape(_quoted(name))}-[0-9a-f]{{{DIGITS}}}")
    found = [p for p in cache_dir.glob("*") if ours.fullmatch(p.name)]
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


def _quoted(name):
    return urllib.parse.quote(name, safe="")


def _write(folder, build):
    # Made before the minutes of decoding, so that it is known before that it can be.
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        arrays = build()
        _save(arrays, unfinished)
        unfinished.rename(folder)
    except OSError as e:
        if not folder.exists():  # or another process was faster
            # NumPy's error of a short write has neither a number nor a name.
            reason = e.strerror or f"cannot be written: {e}"
            raise OSError(e.errno or errno.ENOSPC, reason, e.filename or str(folder)) from e
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _save(arrays, folder):
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(arrays, name))
    content = {k: v for k, v in arrays._asdict().items() if k not in ARRAYS}
    content["crc32"] = {name: crc32(folder / f"{name}.npy") for name in ARRAYS}
    text = json.dumps(content)
    meta = {"content": text, "crc32": zlib.crc32(text.encode())}
    (folder / "meta.json").write_text(json.dumps(meta))


def mapped(folder: Path) -> Arrays:
    """The arrays in the folder of an entry, mapped into memory.

    Raises:
      UserError: a file is damaged.
    """

    def damaged(name, reason):
        return UserError(
            f"damaged cache file {folder / name} ({reason}): delete the folder {folder} and "
            "run again"
        )

    try:
        meta = json.loads((folder / "meta.json").read_text())
        whole = zlib.crc32(meta["content"].encode()) == meta["crc32"]
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as e:
        raise damaged("meta.json", type(e).__name__) from e
    if not whole:
        raise damaged("meta.json", "its checksum differs")
    content = json.loads(meta["content"])
    checksums, arrays = content.pop("crc32"), {}
    for name in ARRAYS:
        path = folder / f"{name}.npy"
        # Before NumPy parses it, which a damaged header makes do anything.
        if crc32(path) != checksums[name]:
            raise damaged(path.name, "its checksum differs" if path.exists() else "missing")
        arrays[name] = np.load(path, mmap_mode="r")
    content["mean"], content["std"] = tuple(content["mean"]), tuple(content["std"])
    return Arrays(**arrays, **content)


def crc32(path: Path) -> int | None:
    """Of the file's content; None for one that is missing or empty, which cannot be mapped."""
    if not path.exists() or not path.stat().st_size:
        return None
    return zlib.crc32(np.memmap(path, np.uint8, mode="r").data)
