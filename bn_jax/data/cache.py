"""Decoded arrays on disk: written once, mapped into memory afterwards.

A folder per dataset holds one `.npy` file per array and `meta.json` with the rest and the
CRC-32 of each file. It is filled under a temporary name and renamed, so that a folder that
exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bn_jax.data.arrays import Arrays
from bn_jax.errors import UserError

ARRAYS = ("train_inputs", "train_labels", "test_inputs", "test_labels")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/bn_jax`, by default `~/.cache/bn_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bn_jax"


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
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
    folder = cache_dir / f"{name.replace('/', '-').replace(':', '-')}-{digest}"
    if not folder.exists():
        _write(folder, build())
    return _read(folder)


def _write(folder, arrays):
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for name in ARRAYS:
            np.save(unfinished / f"{name}.npy", getattr(arrays, name))
        meta = {k: v for k, v in arrays._asdict().items() if k not in ARRAYS}
        checksums = {name: _crc32(unfinished / f"{name}.npy") for name in ARRAYS}
        (unfinished / "meta.json").write_text(json.dumps({**meta, "crc32": checksums}))
        if not folder.exists():  # Another process may have been faster.
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read(folder):
    try:
        meta = json.loads((folder / "meta.json").read_text())
        checksums = meta.pop("crc32")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        meta["mean"], meta["std"] = tuple(meta["mean"]), tuple(meta["std"])
        damaged = [n for n in ARRAYS if _crc32(folder / f"{n}.npy") != checksums[n]]
        result = Arrays(**arrays, **meta)
    except (ValueError, KeyError, TypeError, EOFError, FileNotFoundError) as e:
        raise UserError(f"damaged cache folder {folder} ({e}): delete it and run again") from e
    if damaged:
        raise UserError(
            f"damaged cache file {folder / damaged[0]}.npy (its checksum differs): delete the "
            f"folder {folder} and run again"
        )
    return result


def _crc32(path):
    mapped = np.memmap(path, np.uint8, mode="r")
    return zlib.crc32(mapped)
