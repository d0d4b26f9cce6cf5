"""How a sweep goes on where it was stopped: its records, and checkpoints while it trains."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import jax
import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize

from bn_jax.lab.flags import Stopped
from bn_jax.lab.report import read_records
from bn_jax.lab.statistics import Point, Record
from bn_jax.lab.sweeps import Evaluation
from bn_jax.lab.sweeps.sweep import Underway
from bn_jax.lab.training.distributed import any_process
from bn_jax.lab.training.signals import on_sigterm

if TYPE_CHECKING:
    from bn_jax.lab.experiment import Plan
    from bn_jax.lab.training.checkpoint import Checkpoints, Restored

END = sys.maxsize  # number of a chunk past the last
T = TypeVar("T")


class Where(TypedDict, total=False):
    """Keywords of `bn_jax.lab.sweeps.sweep`: what of an arm is trained, and how it begins."""

    done: Callable[[Point, int], bool]
    first: int
    resume: Callable[[Any], Underway]


class Resumable:
    """The records and checkpoints of an experiment that trains some arms, then perhaps others.

    A run whose record is there is not trained again, unless a watcher keeps something of it.
    That is in checkpoints alone, so there is one more of those when all is trained.

    Args:
      folder: of the run.
      every: seconds between two checkpoints; 0: after every evaluation.
      kept: what a watcher keeps of runs, by (arm, `Point`, seed), filled again; or None.

    Attributes:
      records: of the runs that were done.

    Raises:
      UserError: the records are damaged, or no checkpoint is whole.
    """

    def __init__(self, folder: Path, every: float, kept: dict[tuple, Any] | None = None):
        self._folder, self._every, self._kept = folder / "checkpoints", every, kept
        self._saved_at, self._trained = time.monotonic(), False
        found = self._checkpoints.restore() if any_process(self._folder.exists()) else None
        about = found.extra if found else {"arm": None, "number": 0, "records": [], "steps": 0}
        self.records: list[Record] = []
        self._known: set[tuple[str, Point, int]] = set()
        for line in about["records"] + _records(folder / "records.jsonl"):
            self.add(Record.from_json(line))
        self._before = self._steps = about["steps"]
        self._arm, self._number, self._bytes = (
            about["arm"],
            about["number"],
            about.get("bytes", 0),
        )
        if self._number == END:
            self._restore({})

    @functools.cached_property
    def _checkpoints(self) -> Checkpoints:
        # Importing Orbax takes half a second, which a run without checkpoints need not wait.
        from bn_jax.lab.training.checkpoint import Checkpoints

        return Checkpoints(self._folder)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside, `after` heeds SIGTERM; at the end all that it saved is written."""
        with on_sigterm() as self._stop:
            try:
                yield
            finally:
                self._close()

    def add(self, record: Record) -> bool:
        """Whether the record is of a run that had none: then it is in `records` now."""
        new = record.run not in self._known
        if new:
            self._known.add(record.run)
            self.records.append(record)
        return new

    def done(self, plans: Mapping[str, Plan]) -> int:
        """How many steps of these arms, over all runs, need not be trained."""
        total = sum(plan.budget.steps * plan.count for plan in plans.values())
        done = min(total, self._before)
        self._before -= done
        if self._kept is None:
            own = [plans[r.arm].budget.steps for r in self.records if r.arm in plans]
            done = max(done, sum(own))
        return done

    def rest(self, arms: Mapping[str, T]) -> Iterator[tuple[str, T]]:
        """The items of those arms that are not done."""
        for name, item in arms.items():
            if self._arm in (None, name):
                yield name, item
                self._arm = None

    def where(self, arm: str) -> Where:
        """What of the arm a sweep trains, and how it begins."""

        def done(point, seed):
            return self._kept is None and (arm, point, seed) in self._known

        if arm != self._arm:
            return {"done": done}
        return {"done": done, "first": self._number, "resume": self._resume}

    def _resume(self, state: Any) -> Underway:
        """From a state like the engine's to what was saved."""
        found, history = self._restore(state)
        done, seconds = found.extra["done"], tuple(found.extra["seconds"])
        return Underway(done, found.state["state"], history, seconds)

    def _restore(self, state: Any) -> tuple[Restored, list[dict[str, np.ndarray]]]:
        """The checkpoint and its history; what the watcher had kept it has again."""
        like = {"state": state, "rest": np.zeros(self._bytes, np.uint8)}
        found = self._checkpoints.restore(like)
        assert found  # as it was when this began
        rest: Any = msgpack_restore(found.state["rest"].tobytes())
        if self._kept is not None:
            self._kept.update({_key(text): value for text, value in rest["kept"].items()})
        return found, rest["history"]

    def after(self, arm: str, evaluation: Evaluation, records: Sequence[Record]) -> None:
        """Saves after an evaluation if it is time, or if SIGTERM came.

        Raises:
          Stopped: in that case.
        """
        self._steps += evaluation.run_steps
        self._trained = True
        stop = any_process(self._stop.requested)
        late = evaluation.step > 0 and time.monotonic() - self._saved_at >= self._every
        if stop or any_process(late):
            self._save(self._steps, arm, evaluation.number, evaluation.underway, records)
        if stop:
            self._close()
            raise Stopped

    def ended(self, arms: Iterable[str]) -> None:
        """Saves what the watcher keeps when all of these arms are trained."""
        if self._kept is not None and self._trained:
            nothing = Underway(0, {}, [], (0.0, 0.0))
            # After the last evaluation there may be a checkpoint of these steps already.
            self._save(self._steps + 1, [*arms][-1], END, nothing, self.records)
        self._trained = False

    def _save(self, step, arm, number, underway, records):
        kept = {_text(key): value for key, value in (self._kept or {}).items()}
        rest = jax.tree.map(np.asarray, {"history": underway.history, "kept": kept})
        content = np.frombuffer(msgpack_serialize(rest), np.uint8)
        about = {
            "arm": arm,
            "number": number,
            "done": underway.done,
            "seconds": underway.seconds,
            "records": [record.to_json() for record in records],
            "steps": self._steps,
            "bytes": content.size,
        }
        self._checkpoints.save(step, {"state": underway.state, "rest": content}, about)
        self._saved_at = time.monotonic()

    def _close(self):
        if "_checkpoints" in vars(self):
            self._checkpoints.close()


def _records(path):
    """Those of an earlier start; none with several processes, which may not see the same."""
    return read_records(path) if jax.process_count() == 1 and path.exists() else []


def _text(key):
    arm, point, rest = key
    return json.dumps([arm, list(point), rest])


def _key(text):
    arm, point, rest = json.loads(text)
    return arm, Point(*point), rest
