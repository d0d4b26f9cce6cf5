"""The training of one network on a stream: evaluated, saved, and gone on with."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from bn_jax.data.imagenet import Records, batches, to_device
from bn_jax.errors import UserError
from bn_jax.measure.apart import cores
from bn_jax.training.distributed import everyone
from experiments.flags import Stopped
from experiments.position import Position, evaluations, from_tree, to_tree
from experiments.streaming import Counts, Programs, Sums

# Steps that are queued on the device while the next batch is read; each holds its images.
AHEAD = 2
# By which one checkpoint is the best, and stays.
BEST = "test_accuracy"


class Sets(NamedTuple):
    """What is trained on, and what is tested on; of `bn_jax.data.imagenet.open_split`."""

    train: Records
    test: Records


class Training:
    """From the beginning, or from where a checkpoint has it, to the end.

    Args:
      config: of `experiments.imagenet`, with its steps.
      sets: the data.
      programs: of the network.
      checkpoints: of this training alone.
      stop: of `bn_jax.training.signals.on_sigterm`.
      show: is given how many steps were done since the last time, and how it stands.
    """

    def __init__(
        self,
        config: Any,
        sets: Sets,
        programs: Programs,
        checkpoints: Any,
        stop: Any,
        show: Callable[[int, str], None],
    ):
        self._config, self._sets, self._programs = config, sets, programs
        self._checkpoints, self._stop, self._show = checkpoints, stop, show
        self._state, self.position = programs.init(config.seed), Position()
        if found := checkpoints.restore(to_tree(self._state)):
            self._state, self.position = from_tree(found.state), Position(**found.extra)
        self._shown, self._bad, self._snapshot = 0, 0, None
        self._queue: collections.deque[Any] = collections.deque()
        self._doing, self._since = "training", time.perf_counter()
        self._logged = self.position.step, self._since
        self._say("")

    def run(self) -> Position:
        """Trains to the end, where the last checkpoint is.

        Raises:
          Stopped: SIGTERM came; all is saved.
          UserError: of the data.
        """
        config, position = self._config, self.position
        reader = self._read(self._sets.train, train=True, first_step=position.step)
        with contextlib.closing(reader):
            batches = to_device(reader, self._put)
            while not position.ended:
                evaluated = self._to_evaluate()
                if evaluated:
                    self._evaluate()
                position.ended = position.step == config.steps or position.diverged_at >= 0
                if position.ended or (evaluated and position.step):
                    self._save()  # it may be the best
                if not position.ended:
                    self._advance(*next(batches))
        self._checkpoints.wait()
        return position

    def _to_evaluate(self):
        return self.position.step in evaluations(self._config)[len(self.position.history) :]

    def _read(self, records, **options):
        config = self._config
        return batches(
            records, batch_size=config.batch_size, image_size=config.image_size,
            seed=config.seed, workers=workers(config),
            process_index=jax.process_index(), process_count=jax.process_count(),
            max_bad_examples=config.max_bad_examples, **options,
        )  # fmt: skip

    def _put(self, batch):
        return self._programs.put(batch), batch.bad

    def _advance(self, batch, bad):
        position, config = self.position, self._config
        self._state, loss = self._programs.step(self._state, batch)
        self._wait(loss)
        # In the first epoch every image comes once.
        rows = np.flatnonzero(bad) * jax.process_count() + jax.process_index()
        first = position.step * config.batch_size + rows < self._sets.train.ends[-1]
        self._bad += int(first.sum())
        position.step += 1
        if position.step % config.log_every == 0:
            self._log()
        self._look(position.step)

    def _wait(self, result):
        self._queue.append(result)
        if len(self._queue) > AHEAD:
            jax.block_until_ready(self._queue.popleft())

    def _log(self):
        """Shows what was asked for the last time, and asks for what is so far."""
        if self._snapshot is not None:
            sums, diverged_at = everyone(self._snapshot)
            self.position.diverged_at = int(diverged_at)
            step, then = self._logged
            self._logged = self.position.step, time.perf_counter()
            rate = (self._logged[0] - step) * self._config.batch_size / (self._logged[1] - then)
            self._say(f"loss {_mean(sums)[0]:.3g}, {rate:,.0f} images/s")
        asked = (self._state.sums, self._state.diverged_at)
        self._snapshot = jax.tree.map(jnp.copy, asked)
        for leaf in jax.tree.leaves(self._snapshot):
            leaf.copy_to_host_async()

    def _evaluate(self):
        jax.block_until_ready(self._state)
        self._tick("evaluation")
        counts, bad = self._programs.zero(Counts), 0
        with contextlib.closing(self._read(self._sets.test, train=False)) as reader:
            for i, (batch, broken) in enumerate(to_device(reader, self._put)):
                counts = self._programs.count(self._state, counts, batch)
                self._wait(counts)
                bad += int(broken.sum())
                self._look(i)
        self.position.test_bad = total(bad)
        self._add_bad()
        self._note(everyone(self._state.sums), everyone(counts))
        self._state = self._state._replace(sums=self._programs.zero(Sums))
        self._snapshot = None
        self._tick("training")
        self._logged = self.position.step, self._since

    def _note(self, sums, counts):
        position, examples = self.position, max(float(counts.examples), 1.0)
        loss, accuracy = _mean(sums)
        found = {f"test_{k}": float(v) / examples for k, v in counts._asdict().items()}
        del found["test_examples"]
        found |= {"step": position.step, "train_loss": loss, "train_accuracy": accuracy}
        position.history.append(found)
        position.diverged_at = int(everyone(self._state.diverged_at))
        if position.diverged_at < 0 and not np.isfinite(found["test_loss"]):
            position.diverged_at = position.step
        top1, top5 = (100 * found[f"test_{k}accuracy"] for k in ("", "top5_"))
        before = f"loss {loss:.3g}, " if sums.steps else ""
        self._say(f"{before}top-1 {top1:.1f} %, top-5 {top5:.1f} %")

    def _say(self, text):
        position = self.position
        self._show(position.step - self._shown, text and f"step {position.step:,}, {text}")
        self._shown = position.step

    def _tick(self, then):
        now = time.perf_counter()
        self.position.seconds[self._doing] += now - self._since
        self._doing, self._since = then, now

    def _add_bad(self):
        position, allowed = self.position, self._config.max_bad_examples
        position.bad, self._bad = position.bad + total(self._bad), 0
        if position.bad > allowed:
            raise UserError(
                f"{position.bad} broken images to train on: allow that many with "
                f"max_bad_examples (now {allowed}), or prepare the set again"
            )

    def _look(self, number):
        """Saves if it is time, or if SIGTERM came, which ends the training."""
        # To agree takes the processes longer than a step.
        if jax.process_count() > 1 and number % self._config.log_every:
            return
        stop = total(self._stop.requested) > 0
        # A step is saved once: one that is to be evaluated, after that.
        due = not self._to_evaluate()
        if stop or (due and self._checkpoints.due(self._config.checkpoint_every)):
            self._save()
        if stop:
            self._checkpoints.close()
            raise Stopped

    def _save(self):
        self._tick(self._doing)
        self._add_bad()
        self.position.skipped = int(everyone(self._state.train.skipped))
        about, metrics = dataclasses.asdict(self.position), None
        if self.position.history and self.position.history[-1]["step"] == self.position.step:
            metrics = {BEST: self.position.history[-1][BEST]}
        self._checkpoints.save(self.position.step, to_tree(self._state), about, metrics)


def workers(config: Any) -> int:
    """How many processes decode."""
    return cores() - 1 if config.workers is None else config.workers


def total(number: int) -> int:
    """The sum over the processes."""
    if jax.process_count() == 1:
        return int(number)
    return int(process_allgather(np.int32(number)).sum())


def _mean(sums):
    steps = float(sums.steps) or np.nan
    return float(sums.loss) / steps, float(sums.accuracy) / steps
