"""How a run survives: checkpoints while it trains, and going on where it was."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bn_jax.training.signals import Stop
from experiments.flags import Stopped


class Survival:
    """The checkpoints of an experiment's training.

    Args:
      checkpoints: `bn_jax.training.checkpoint.Checkpoints`.
      every: seconds between two; 0: after every evaluation.
      stop: of `bn_jax.training.signals.on_sigterm`.
      kept: what a watcher keeps of runs, by (arm, `Point`, seed); filled again.

    Attributes:
      records: of the runs that were done.
      steps: of training that were done, over all runs.
    """

    def __init__(
        self,
        checkpoints: Any,
        every: float,
        stop: Stop,
        kept: dict[tuple, Any],
    ):
        self._checkpoints, self._every, self._stop = checkpoints, every, stop
        self._kept = kept
        found = checkpoints.newest()
        about = found.extra if found else {"arm": None, "number": 0, "records": [], "steps": 0}
        self.records, self.steps = about["records"], about["steps"]
        self._arm, self._number, self._bytes = about["arm"], about["number"], about.get("bytes")

    def rest(self, arms: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The items of those arms that are not done."""
        return itertools.dropwhile(lambda a: self._arm not in (None, a[0]), arms.items())

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
        self.steps += evaluation.run_steps
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
            "records": records, "steps": self.steps, "bytes": content.size,
        }  # fmt: skip
        self._checkpoints.save(self.steps, {"state": state, "rest": content}, about)


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
