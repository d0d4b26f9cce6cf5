"""Checkpoints that a kill, a full disk or a damaged file cannot turn into a wrong state.

Orbax writes them in the background, by all processes together, and names a folder only when
it is complete. It does not check the files later: with a bit flipped in a stored array, Orbax
0.12.8 mostly restores other numbers without a word. So a file of checksums is written last,
and a checkpoint is restored only if they hold.

    <folder>/<step>/state           the arrays, as Orbax's StandardSave writes them
    <folder>/<step>/extra.msgpack   what is saved beside them
    <folder>/<step>/checksums.json  SHA-256 of the files by path
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.serialization import msgpack_restore, msgpack_serialize
from jax.experimental.multihost_utils import broadcast_one_to_all

from bn_jax.errors import UserError

KEEP = 2  # checkpoints; the last ones
EXTRA, CHECKSUMS = "extra.msgpack", "checksums.json"
# Orbax writes these after all others. With any damage to them it restores the same state.
UNCHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt")
UNFINISHED = ".orbax-checkpoint-tmp*"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NONE, DAMAGED = -1, -2


class Restored(NamedTuple):
    """A step, its state, and what was saved beside it."""

    step: int
    state: Any
    extra: Any


class Checkpoints:
    """The checkpoints of one run, a folder for each step; nothing else should write there.

    With several processes all of them make the same calls; the folder is one that all see.
    Arrays are then global ones, as of `jax.make_array_from_process_local_data`, or the same
    in every process. What the user should know is a line on stderr.
    """

    def __init__(self, folder: Path):
        self._folder = Path(folder).expanduser().absolute()
        self._manager: ocp.CheckpointManager | None = None
        self._saving, self._extra = NONE, b""

    def save(self, step: int, state: Any, extra: Any) -> None:
        """Starts to save, once the save before is done; the state may be donated afterwards.

        On a full disk one line is said, by this call or a later one, the checkpoints before
        stay as they are, and the next save tries again. (With several processes it is an
        error: the others cannot know.)

        Args:
          step: its number, above that of an earlier save; what is there is not saved again.
          state: a pytree of arrays, typed keys among them, not all without elements.
          extra: dicts with text as keys, and lists, of numbers, text, None and arrays.

        Raises:
          ValueError: two arrays have one name, as "a.b" and a, b have.
          OSError: the folder cannot be written, for another reason than a full disk.
        """
        about = msgpack_serialize({"extra": extra, "arrays": _described(state)})
        self.wait()
        self._saving, self._extra = step, about
        try:
            manager = self._open()
            if step not in manager.all_steps():
                arrays = ocp.args.StandardSave(jax.tree.map(_stored, state))
                manager.save(step, args=ocp.args.Composite(state=arrays), force=True)
        except Exception as e:
            self._give_up(e)

    def restore(self, like: Any = None) -> Restored | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Every damaged one that is newer is said and deleted.

        Args:
          like: a pytree as was saved, of jax arrays, `ShapeDtypeStruct`s or numpy arrays.
            Each array comes back as its kind, with its sharding. None: no state is read.

        Raises:
          UserError: none is whole, or its arrays are others than `like`'s.
        """
        self.close()
        step = self._newest_whole() if jax.process_index() == 0 else NONE
        step = int(broadcast_one_to_all(np.int32(step)))
        if step == DAMAGED:
            raise UserError(
                f"no checkpoint in {self._folder} is whole: put a copy back, or delete that "
                "folder to start from the beginning"
            )
        if step == NONE:
            return None
        about = msgpack_restore((self._folder / str(step) / EXTRA).read_bytes())
        state = None if like is None else self._state(step, like, about["arrays"])
        return Restored(step, state, about["extra"])

    def _state(self, step, like, described):
        for there, here in itertools.zip_longest(
            described, _described(like), fillvalue="no more"
        ):
            if there != here:
                raise UserError(
                    f"{self._folder / str(step)} is of another run: it has {there} where this "
                    f"one has {here}; use its flags, or another folder"
                )
        template = ocp.args.StandardRestore(jax.tree.map(_template, like))
        found = self._open().restore(step, args=ocp.args.Composite(state=template))["state"]
        leaves, structure = jax.tree.flatten(like)
        arrays = iter(jax.tree.leaves(found))
        return structure.unflatten(_as(v, next(arrays) if v.size else None) for v in leaves)

    def wait(self) -> None:
        """Returns when the last save has ended, well or with a full disk."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as e:
                self._give_up(e)

    def close(self) -> None:
        """Waits, and ends Orbax's threads; to be called before the program ends."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self):
        if self._manager is None:
            # Its tracebacks of errors that are raised as well.
            logging.getLogger("absl").addFilter(_not_of_orbax)
            self._folder.mkdir(parents=True, exist_ok=True)
            # In the background, folders that cannot be made leave threads that wait for them
            # for 20 minutes, and the program cannot end.
            background = ocp.AsyncOptions(
                post_finalization_callback=self._seal, create_directories_asynchronously=False
            )
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEEP, async_options=background, cleanup_tmp_directories=True
                ),
            )
        return self._manager

    def _seal(self):
        """Called by Orbax in process 0 when all is written, before the folder gets its name."""
        (folder,) = self._folder.glob(f"{self._saving}{UNFINISHED}")
        _write(folder / EXTRA, self._extra)
        files = [p for p in folder.rglob("*") if p.is_file() and p.name not in UNCHECKED]
        sums = {p.relative_to(folder).as_posix(): _checksum(p) for p in files}
        _write(folder / CHECKSUMS, json.dumps(sums, indent=0).encode())

    def _newest_whole(self):
        faults = {step: fault(self._folder / str(step)) for step in self._steps()}
        whole = [step for step, found in faults.items() if found is None]
        newest = whole[-1] if whole else NONE
        then = f"going back to step {newest}" if whole else "none before it is whole"
        for step, found in faults.items():
            if found and step > newest:
                _say(f"checkpoint of step {step} is damaged, {found}: {then}")
            # An older one may be what a kill left of one that was being deleted.
            if found and whole:
                shutil.rmtree(self._folder / str(step))
        return DAMAGED if faults and not whole else newest

    def _steps(self):
        names = [p.name for p in self._folder.glob("*") if p.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def _give_up(self, error):
        """Raises the error unless it is one that training can go on with."""
        reason = next((os.strerror(c) for c in FULL if os.strerror(c) in str(error)), None)
        if reason is None or jax.process_count() > 1:
            raise error
        # It would raise its error again, and has forgotten what it wanted to delete.
        self._manager = None
        for left in self._folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)
        kept = "there is no checkpoint yet"
        if steps := self._steps():
            kept = f"kept the checkpoint of step {steps[-1]}"
        _say(f"disk full: step {self._saving} is not saved ({reason}); {kept}")


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words that name the first one, or None.

    Raises:
      OSError: a file is there and cannot be read.
    """
    name = CHECKSUMS
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for name in (EXTRA, *sums):
            if _checksum(folder / name) != sums[name]:
                return f"{name} is not as it was written"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except (ValueError, LookupError, TypeError):
        return f"{CHECKSUMS} is not as it was written"
    return None


def _write(path, content):
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _say(line):
    print(line, file=sys.stderr)


def _checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_of_orbax(record):
    return "orbax" not in Path(record.pathname).parts


def _described(state):
    """Name, dtype and shape of every array, as text."""
    leaves = jax.tree.leaves_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two arrays of the state are named {min(twice)}: rename one")
    return [f"{jax.tree_util.keystr(path)} {v.dtype}{list(v.shape)}" for path, v in leaves]


def _stored(leaf):
    """What Orbax takes: keys as the numbers in them, None for an array without elements.

    With several processes an array that only this one's devices hold is taken to be the same
    in all.
    """
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if not leaf.size:
        return None
    local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    return np.array(leaf) if local and jax.process_count() > 1 else leaf


def _template(leaf):
    """What Orbax is to make of `_stored(leaf)`."""
    numbers, sharding = _numbers(leaf), _sharding(leaf)
    if not leaf.size:
        return None
    if sharding is None or sharding.is_fully_addressable:
        return np.empty(numbers.shape, numbers.dtype)
    return jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=sharding)


def _as(leaf, value):
    numbers = _numbers(leaf)
    value = np.zeros(numbers.shape, numbers.dtype) if value is None else value
    if isinstance(leaf, np.ndarray):
        return np.asarray(value)
    if _is_key(leaf):
        value = jax.random.wrap_key_data(jnp.asarray(value), impl=leaf.dtype)
    sharding = _sharding(leaf)
    # What was not bound to a device must not be: it would not go with arrays of a mesh.
    return jnp.asarray(value) if sharding is None else jax.device_put(value, sharding)


def _sharding(leaf):
    bound = leaf.committed if isinstance(leaf, jax.Array) else hasattr(leaf, "sharding")
    return leaf.sharding if bound else None


def _numbers(leaf):
    """Of shape and dtype as they are stored."""
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
