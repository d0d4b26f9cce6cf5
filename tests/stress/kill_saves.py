"""Kills a program that saves checkpoint after checkpoint, and looks what is left each time.

    python tests/stress/kill_saves.py --kills=200

Each time the newest checkpoint must be whole and hold what was saved at its step, and be no
older than the save before the one that was going on.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

# A script's path is its own folder.
sys.path.insert(0, str(Path(__file__).parents[2]))

from bn_jax.lab.training.checkpoint import Checkpoints


class Outcome(NamedTuple):
    """Of one kill.

    Attributes:
      inside: a save, as what it left shows.
      started: the last step of which `save` returned.
      found: the step restored, -1 for none.
    """

    inside: bool
    started: int
    found: int


def state_at(step):
    """A state that only this step has, of a few small arrays and one of several chunks."""
    rng = np.random.default_rng(step)
    layers = {f"layer_{i}": rng.normal(size=(20, i + 1)).astype("f4") for i in range(6)}
    return {"params": layers, "step": np.int32(step), "large": rng.integers(2**62, size=50_000)}


def extra_at(step):
    """The JSON beside it."""
    return {"position": step * 7, "records": [{"step": i} for i in range(step % 40)]}


def save_on(folder, log):
    """Goes on from the newest checkpoint; the log gets each step when its `save` returns."""
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore(state_at(0))
    first = 0 if restored is None else restored.step + 1
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in itertools.count(first):
        checkpoints.save(step, state_at(step), extra_at(step))
        os.write(file, b"%d\n" % step)


def kills(folder, count, rng):
    """Yields the `Outcome` of each kill.

    Raises:
      AssertionError: a checkpoint is not what was saved, or too old.
    """
    context = multiprocessing.get_context("forkserver")
    # The children start in no time, as the server that they fork from has imported all.
    context.set_forkserver_preload(["bn_jax.lab.training.checkpoint"])
    log = Path(folder) / "log"
    log.touch()
    for _ in range(count):
        before = log.stat().st_size
        child = context.Process(target=save_on, args=(Path(folder) / "steps", log))
        child.start()
        while log.stat().st_size == before and child.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        assert child.is_alive(), "the program ended by itself"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        yield _look(Path(folder) / "steps", int(log.read_text().split()[-1]))


def _look(folder, started):
    inside = any(folder.glob("*.orbax-checkpoint-tmp*"))
    checkpoints = Checkpoints(folder)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        restored = checkpoints.restore(state_at(0))
        checkpoints.close()
    assert not said.getvalue()
    found = -1 if restored is None else restored.step
    assert found >= started - 1, f"step {found} is left of {started}"
    if restored is not None:
        assert restored.extra == extra_at(found)
        jax.tree.map(np.testing.assert_array_equal, restored.state, state_at(found))
    return Outcome(inside, started, found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(kills(folder, flags.kills, random.Random(flags.seed)))
    inside = sum(o.inside for o in outcomes)
    print(f"{len(outcomes)} kills, {inside} of them inside a save: every checkpoint whole")
    print(f"{outcomes[-1].started + 1} saves")


if __name__ == "__main__":
    main()
