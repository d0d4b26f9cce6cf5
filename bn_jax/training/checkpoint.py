"""Checkpoints that a kill, a full disk or a damaged file cannot turn into a wrong state.

Orbax writes them, in the background and by all processes together, and gives a folder its
name only when it is complete. It does not notice what becomes of the files afterwards: with
a bit flipped in a stored array, Orbax 0.12.8 mostly restores other numbers without a word.
So the last thing written before the name is a file of checksums, and a checkpoint is
restored only if they hold.

    <folder>/<step>/state           the arrays, as Orbax's StandardSave writes them
    <folder>/<step>/extra           the JSON beside them
    <folder>/<step>/checksums.json  SHA-256 of the files by path
    <folder>/<step>.replaced        the same, while the step is saved again
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bn_jax.errors import UserError
from bn_jax.training import checksums, stored
from bn_jax.training.distributed import barrier

UNFINISHED, REPLACED = ".orbax-checkpoint-tmp*", ".replaced"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NONE, DAMAGED = -1, -2


class Restored(NamedTuple):
    """What `Checkpoints.restore` found: a step, its state, and the JSON beside it."""

    step: int
    state: Any
    extra: Any


class Checkpoints:
    """The checkpoints of one run.

    With several processes all of them make the same calls; the folder is one that all see.
    Arrays are then global ones, as of `jax.make_array_from_process_local_data`, or the same
    in every process.

    Args:
      folder: holds a folder for each step; nothing else should write there.
      keep: how many of the last ones stay.
      best: name of a metric; the checkpoint where it was largest stays as well.
      say: is given a line for the user, in process 0.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        best: str | None = None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ):
        if keep < 1:
            raise ValueError(f"keep={keep}: keep at least 1 checkpoint")
        self._folder = Path(folder).expanduser().absolute()
        self._keep, self._best, self._say = keep, best, say
        self._manager, self._saving = None, None
        self._saved_at = time.monotonic()

    def due(self, seconds: float) -> bool:
        """Whether so much time has passed since the last `save`, or since the start.

        Process 0 decides for all. A save takes tens of milliseconds however small the state:
        one every step may cost more than the training.
        """
        from jax.experimental.multihost_utils import broadcast_one_to_all

        late = time.monotonic() - self._saved_at >= seconds
        return bool(broadcast_one_to_all(np.int32(late)))

    def save(
        self, step: int, state: Any, extra: Any, metrics: dict[str, float] | None = None
    ) -> None:
        """Starts to save, once the save before is done; the state may be donated afterwards.

        On a full disk one line is said, by this call or a later one, the checkpoints before
        stay as they are, and the next save tries again. (With several processes it is an
        error: the others cannot know.)

        Args:
          step: not below that of an earlier save; one that is there already is replaced, and
            comes back where a kill or a full disk ends that.
          state: a pytree of arrays, typed keys among them.
          extra: what `json.dumps` takes.
          metrics: for `best`; one that is not finite is never the best.

        Raises:
          TypeError: of `extra`, by `json.dumps`.
          OSError: the folder cannot be written, for another reason than a full disk.
        """
        from orbax.checkpoint import args

        about = {"extra": json.dumps(extra), "arrays": stored.describe(state)}
        self.wait()
        self._saved_at, self._saving = time.monotonic(), step
        try:
            manager = self._open()
            if step in manager.all_steps():
                self._set_aside(step)
            items = {"extra": args.JsonSave(about)}
            if arrays := stored.to_arrays(state):
                items["state"] = args.StandardSave(arrays)
            ranked = self._ranked(metrics or {})
            manager.save(step, args=args.Composite(**items), metrics=ranked, force=True)
        except Exception as e:
            self._give_up(e)

    def newest(self) -> Restored | None:
        """The newest checkpoint that is whole, without its state, which `restore` reads.

        None where there is none at all. Every damaged one that is newer is said and deleted.

        Raises:
          UserError: none is whole.
        """
        found = self._read()
        return found and Restored(found[0], None, json.loads(found[1]["extra"]))

    def restore(self, like: Any) -> Restored | None:
        """That of `newest`, with its state.

        Args:
          like: a pytree as was saved, of jax arrays, `ShapeDtypeStruct`s or numpy arrays.
            Each array comes back as its kind, with its sharding.

        Raises:
          UserError: none is whole, or its arrays are others than `like`'s.
        """
        from orbax.checkpoint import args

        found = self._read()
        if found is None:
            return None
        step, about = found
        stored.check(like, about["arrays"], self._folder / str(step))
        arrays = {}
        if template := stored.to_template(like):
            items = args.Composite(state=args.StandardRestore(template))
            arrays = self._open().restore(step, args=items).state
        return Restored(step, stored.from_arrays(like, arrays), json.loads(about["extra"]))

    def _read(self):
        """The step of the newest that is whole, and the JSON that describes it; or None."""
        from jax.experimental.multihost_utils import broadcast_one_to_all

        self.close()
        self._clear()
        step = self._newest_whole() if jax.process_index() == 0 else NONE
        step = int(broadcast_one_to_all(np.int32(step)))
        if step == DAMAGED:
            raise UserError(
                f"no checkpoint in {self._folder} is whole: put a copy back, or delete that "
                "folder to start from the beginning"
            )
        if step == NONE:
            return None
        from orbax.checkpoint import args

        items = args.Composite(extra=args.JsonRestore())
        return step, self._open().restore(step, args=items).extra

    def wait(self) -> None:
        """Returns when the last save has ended, well or with a full disk."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
                self._clear()
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
            from orbax.checkpoint import CheckpointManager

            # Its tracebacks of errors that are raised as well.
            logging.getLogger("absl").addFilter(_not_of_orbax)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clear()
            self._manager = CheckpointManager(self._folder, options=self._options())
        return self._manager

    def _options(self):
        import orbax.checkpoint as ocp

        policy = ocp.checkpoint_managers
        keep = [policy.LatestN(self._keep)]
        if self._best:
            ranked = {"get_metric_fn": self._metric, "keep_checkpoints_without_metrics": False}
            keep.append(policy.BestN(n=1, **ranked))
        # In the background, folders that cannot be made leave threads that wait for them
        # for 20 minutes, and the program cannot end.
        background = ocp.AsyncOptions(
            post_finalization_callback=self._seal, create_directories_asynchronously=False
        )
        return ocp.CheckpointManagerOptions(
            best_fn=self._metric if self._best else None,
            preservation_policy=policy.AnyPreservationPolicy(keep),
            async_options=background,
        )

    def _metric(self, metrics):
        return metrics[self._best]

    def _ranked(self, metrics):
        value = float(metrics.get(self._best, math.nan))
        return {self._best: value} if math.isfinite(value) else None

    def _seal(self):
        """Called by Orbax in process 0 when all is written, before the folder gets its name."""
        (folder,) = self._folder.glob(f"{self._saving}{UNFINISHED}")
        checksums.write(folder)

    def _newest_whole(self):
        faults = {step: checksums.fault(self._folder / str(step)) for step in self._steps()}
        whole = [step for step, fault in faults.items() if fault is None]
        newest = whole[-1] if whole else NONE
        then = f"going back to step {newest}" if whole else "none before it is whole"
        for step, fault in faults.items():
            if fault and step > newest:
                self._say(f"checkpoint of step {step} is damaged, {fault}: {then}")
            # An older one may be what a kill left of one that was being deleted.
            if fault and whole:
                shutil.rmtree(self._folder / str(step))
        return DAMAGED if faults and not whole else newest

    def _steps(self):
        names = [p.name for p in self._folder.glob("*") if p.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def _set_aside(self, step):
        """So that the step can be saved again."""
        folder = self._folder / str(step)
        if jax.process_index() == 0:
            folder.rename(folder.with_suffix(REPLACED))
        barrier("a checkpoint is set aside")
        self._manager.reload()

    def _clear(self):
        """Removes what is unfinished and what was replaced; what was not yet comes back."""
        if jax.process_index() != 0:
            return
        for left in self._folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)
        for old in self._folder.glob(f"*{REPLACED}"):
            new = old.with_suffix("")
            shutil.rmtree(old, ignore_errors=True) if new.exists() else old.rename(new)

    def _give_up(self, error):
        """Raises the error unless it is one that training can go on with."""
        reason = next((os.strerror(c) for c in FULL if os.strerror(c) in str(error)), None)
        if reason is None or jax.process_count() > 1:
            raise error
        # It would raise its error again, and has forgotten what it wanted to delete.
        self._manager = None
        self._clear()
        kept = "there is no checkpoint yet"
        if steps := self._steps():
            kept = f"kept the checkpoint of step {steps[-1]}"
        self._say(f"disk full: step {self._saving} is not saved ({reason}); {kept}")


def _not_of_orbax(record):
    return "orbax" not in Path(record.pathname).parts
