"""How a sweep goes on where it was stopped: its records, and checkpoints while it trains."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import jax
import numpy as np

from bn_jax.lab.flags import Stopped
from bn_jax.lab.report import read_records
from bn_jax.lab.statistics import Point, Record
from bn_jax.lab.sweeps import Evaluation
from bn_jax.lab.sweeps.sweep import Underway
from bn_jax.lab.training.distributed import any_process
from bn_jax.lab.training.signals import on_sigterm

if TYPE_CHECKING:
    from bn_jax.lab.experiment import Plan
    from bn_jax.lab.training.checkpoint import Checkpoints

NOTHING = {"arm": None, "number": 0, "records": [], "steps": 0}
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
        self._found: Any = found.extra if found else NOTHING
        self.records: list[Record] = []
        self._known: set[tuple[str, Point, int]] = set()
        for line in self._found["records"] + _records(folder / "records.jsonl"):
            self.add(Record.from_json(line))
        # Of the arm that was trained; None once a sweep is past it.
        self._arm = self._found["arm"]
        self._before = self._steps = self._found["steps"]
        if self._found["number"] == END:
            self._keep_again()

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
        return {"done": done, "first": self._found["number"], "resume": self._resume}

    def _resume(self, state: Any) -> Underway:
        """From a state like the engine's to what was saved."""
        restored = self._checkpoints.restore({"state": state, "steps": np.int64(0)})
        assert restored  # as it was when this began
        self._keep_again()
        found = restored.extra
        seconds = tuple(found["seconds"])
        return Underway(found["done"], restored.state["state"], found["history"], seconds)

    def _keep_again(self):
        """What the watcher had kept it has again."""
        if self._kept is not None:
            for arm, point, rest, value in self._found["kept"]:
                self._kept[arm, Point(*point), rest] = value

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
        kept = [[a, [*p], rest, v] for (a, p, rest), v in (self._kept or {}).items()]
        extra = {
            "arm": arm,
            "number": number,
            "done": underway.done,
            "records": [record.to_json() for record in records],
            "steps": self._steps,
            "seconds": [*underway.seconds],
            "history": underway.history,
            "kept": kept,
        }
        # At the end there is no state, and Orbax wants one array.
        arrays = {"state": underway.state, "steps": np.int64(self._steps)}
        self._checkpoints.save(step, arrays, extra)
        self._saved_at = time.monotonic()

    def _close(self):
        if "_checkpoints" in vars(self):
            self._checkpoints.close()


def _records(path):
    """Those of an earlier start; none with several processes, which may not see the same."""
    return read_records(path) if jax.process_count() == 1 and path.exists() else []
