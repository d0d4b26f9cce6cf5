"""How a run survives: checkpoints while it trains, and going on where it was."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bn_jax.training.checkpoint import Checkpoints
from bn_jax.training.signals import on_sigterm
from experiments.flags import Stopped


class Survival:
    """The checkpoints of an experiment that trains some arms, and then perhaps others.

    Args:
      folder: of the checkpoints.
      every: seconds between two; 0: after every evaluation.
      kept: what a watcher keeps of runs, by (arm, `Point`, seed); filled again.

    Attributes:
      records: of the runs that were done.
    """

    def __init__(self, folder: Path, every: float, kept: dict[tuple, Any]):
        self._checkpoints, self._every, self._kept = Checkpoints(folder), every, kept
        found = self._checkpoints.newest()
        about = found.extra if found else {"arm": None, "number": 0, "records": [], "steps": 0}
        self.records, self._steps = about["records"], about["steps"]
        self._before = self._steps
        self._arm, self._number, self._bytes = about["arm"], about["number"], about.get("bytes")

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside, `after` heeds SIGTERM; at the end all that it saved is written."""
        with on_sigterm() as self._stop, contextlib.closing(self._checkpoints):
            yield

    def done(self, steps: int) -> int:
        """How many of the next so many steps, over all runs, the checkpoint has."""
        done = min(steps, self._before)
        self._before -= done
        return done

    def rest(self, arms: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The items of those arms that are not done."""
        for name, item in arms.items():
            if self._arm in (None, name):
                yield name, item
                self._arm = None

    def where(self, arm: str) -> dict[str, Any]:
        """With which chunk of the arm `bn_jax.measure.sweep` begins, and how."""
        if arm != self._arm:
            return {}
        return {"first": self._number, "resume": self._resume}

    def _resume(self, state):
        """From a state like the engine's to the `Underway` that was saved.

        What the watcher had kept it has again.
        """
        import numpy as np
        from flax.serialization import msgpack_restore

        from bn_jax.measure.sweep import Underway

        like = {"state": state, "rest": np.zeros(self._bytes, np.uint8)}
        found = self._checkpoints.restore(like)
        rest = msgpack_restore(found.state["rest"].tobytes())
        self._kept.update({_key(text): value for text, value in rest["kept"].items()})
        done, seconds = found.extra["done"], tuple(found.extra["seconds"])
        return Underway(done, found.state["state"], rest["history"], seconds)

    def after(self, arm: str, evaluation: Any, records: Sequence[Mapping[str, Any]]) -> None:
        """Saves after an evaluation if it is time, or if SIGTERM came.

        Raises:
          Stopped: in that case.
        """
        self._steps += evaluation.run_steps
        stop = _any(self._stop.requested)
        if stop or (evaluation.step and self._checkpoints.due(self._every)):
            self._save(arm, evaluation, records)
        if stop:
            self._checkpoints.close()
            raise Stopped

    def _save(self, arm, evaluation, records):
        import jax
        import numpy as np
        from flax.serialization import msgpack_serialize

        done, state, history, seconds = evaluation.underway
        kept = {_text(key): value for key, value in self._kept.items()}
        rest = jax.tree.map(np.asarray, {"history": history, "kept": kept})
        content = np.frombuffer(msgpack_serialize(rest), np.uint8)
        about = {
            "arm": arm, "number": evaluation.number, "done": done, "seconds": seconds,
            "records": records, "steps": self._steps, "bytes": content.size,
        }  # fmt: skip
        self._checkpoints.save(self._steps, {"state": state, "rest": content}, about)


def _any(flag):
    """Whether it is set in any process."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(process_allgather(np.int32(flag)).any())


def _text(key):
    arm, point, rest = key
    return json.dumps([arm, list(point), rest])


def _key(text):
    from bn_jax.measure import Point

    arm, point, rest = json.loads(text)
    return arm, Point(*point), rest
