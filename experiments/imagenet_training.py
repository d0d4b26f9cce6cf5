"""ImageNet's training: a network, what is done with a batch, and the loop over batches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax.errors import UserError
from bn_jax.lab import sizes
from bn_jax.lab.arms import Arm
from bn_jax.lab.data.stream import Batch, Records, batches
from bn_jax.lab.flags import Stopped
from bn_jax.lab.models import FAMILIES
from bn_jax.lab.sweeps.threaded import cores
from bn_jax.lab.training.checkpoint import Checkpoints
from bn_jax.lab.training.distributed import any_process, everyone, total
from bn_jax.lab.training.metrics import correct, cross_entropy, in_top
from bn_jax.lab.training.optimizers import optimizer
from bn_jax.lab.training.parallel import batch_mesh, replicate, spread
from bn_jax.lab.training.schedules import schedule
from bn_jax.lab.training.signals import Stop
from bn_jax.lab.training.state import TrainState
from bn_jax.lab.training.step import init_state, train_step
from bn_jax.linen import BatchNorm, GhostBatchNorm

if TYPE_CHECKING:
    from experiments.imagenet import Config

# Goyal et al. 2017, section 5.1: epochs at which the rate drops, of all.
DROPS, OF = (30, 60, 80), 90
# Of ImageNet's training images in [0, 1], red, green and blue.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Placed = tuple[jax.Array, jax.Array, jax.Array]  # images, labels, which of them count


class Sums(NamedTuple):
    """Over batches in training, over examples in a test; `count` is how many."""

    loss: Any
    accuracy: Any
    top5_accuracy: Any
    count: Any

    def mean(self) -> Sums:
        """NaN of nothing."""
        count = float(self.count) or np.nan
        return Sums(*(float(v) / count for v in self))


class Network(NamedTuple):
    """What is trained, as functions that are compiled when they are called."""

    init: Callable[[Any], TrainState]
    step: Callable[[TrainState, Sums, Placed], tuple[TrainState, Sums]]
    test: Callable[[TrainState, Sums, Placed], Sums]


def network(config: Config, arm: Arm, classes: int, warmup: int) -> Network:
    """An arm's network; XLA divides its batches over all devices, and adds up over them."""
    norm, group = arm.norm, config.bn_group_size
    if norm is BatchNorm:
        each = -(-config.batch_size // jax.device_count())
        kind = functools.partial(GhostBatchNorm, group_size=group or each)
        norm = functools.partial(norm if group is None else kind, momentum=config.momentum)
    half = jnp.bfloat16 if config.dtype == "bfloat16" else None
    family = FAMILIES[config.model]
    model = family(num_outputs=classes, norm=norm, width=config.width, dtype=half)
    rule = optimizer(
        config.optimizer, config.highest_rate, schedule=factors(config, warmup), l2=config.l2,
        weight_decay=config.weight_decay, decay_norms=config.decay_norms, clip=config.clip,
    )  # fmt: skip
    loss = functools.partial(cross_entropy, label_smoothing=config.label_smoothing)
    image = config.image_size, config.image_size, 3

    def init(seed):
        return init_state(jax.random.key(seed), model, rule, jnp.zeros((1, *image)))

    def step(state, sums, batch):
        images, labels, counted = batch
        after, means = train_step(
            state, standardised(images), labels, model, rule, loss=loss, counted=counted
        )
        kept, found = after.skipped == state.skipped, Sums(*means, 0.0, 1.0)
        return after, jax.tree.map(lambda s, v: s + jnp.where(kept, v, 0), sums, found)

    def test(state, sums, batch):
        images, labels, counted = batch
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        outputs = model.apply(variables, standardised(images), train=False)
        values = Sums(
            cross_entropy(outputs, labels), correct(outputs, labels),
            in_top(outputs, labels, 5), jnp.ones_like(labels),
        )  # fmt: skip
        return jax.tree.map(
            lambda s, v: s + jnp.where(counted, v, 0).sum(dtype=jnp.float32), sums, values
        )

    name = f"--model={config.model} --width={config.width:g} --image_size={config.image_size}"
    sizes.check_batch(f"--batch_size={config.batch_size} {name}", (config.batch_size, *image))
    try:
        sizes.check_network(name, jax.eval_shape(init, jnp.int32(0)))
    except (OverflowError, TypeError, ValueError) as e:
        raise UserError(f"{name}: {e}") from e
    jit = functools.partial(jax.jit, out_shardings=NamedSharding(batch_mesh(), P()))
    return Network(jit(init), jit(step, donate_argnums=(0, 1)), jit(test))


def factors(config: Config, warmup: int) -> optax.Schedule:
    """On the learning rate, at every step; it rises for `warmup` of them."""
    steps = config.evaluations[-1]
    if config.schedule != "goyal":
        return schedule(
            config.schedule, steps, warmup_steps=warmup, decay_steps=config.decay_steps,
            decay_rate=config.decay_rate,
        )  # fmt: skip
    drops = {steps * drop // OF: 0.1 for drop in DROPS}
    risen = schedule("constant", steps, warmup_steps=warmup)
    dropped = optax.piecewise_constant_schedule(1.0, drops)
    return lambda count: risen(count) * dropped(count)


def standardised(images: jax.Array) -> jax.Array:
    """From uint8 `[n, height, width, 3]` to float32 of mean 0 and variance 1 on ImageNet."""
    mean, std = (jnp.array(v).reshape(1, 1, 1, 3) for v in (MEAN, STD))
    return (images.astype(jnp.float32) / 255 - mean) / std


@dataclasses.dataclass
class Position:
    """Where a training is, beside its state; what JSON can hold.

    Attributes:
      step, history: steps that were done; of the evaluations so far, numbers by name.
      bad, test_bad: broken images that were met, of all processes, each counted once.
      looked, skipped: the step at which the state was last looked at, and what it had skipped.
      diverged_at: the step since which all are skipped, or whose test loss is not finite.
      training, evaluation, compilation: seconds.
    """

    step: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    bad: int = 0
    test_bad: int = 0
    looked: int = 0
    skipped: int = 0
    diverged_at: int | None = None
    training: float = 0.0
    evaluation: float = 0.0
    compilation: float = 0.0


class Training:
    """One network, trained from the beginning or from where a checkpoint has it.

    Args:
      config: with its steps.
      train, test: what it is trained and tested on.
      net: what is trained.
      folder: of the checkpoints of this training alone.
      stop: of SIGTERM.
      show: is given how many steps were done since the last time, and how it stands.
    """

    def __init__(
        self, config: Config, train: Records, test: Records, net: Network, folder: Path,
        stop: Stop, show: Callable[[int, str], None],
    ):  # fmt: skip
        self._config, self._train, self._test, self._net = config, train, test, net
        self._stop, self._show, self._checkpoints = stop, show, Checkpoints(folder)
        self._state, self._sums = net.init(jnp.int32(config.seed)), self._zero()
        self.position, self._bad = Position(), 0
        if found := self._checkpoints.restore(self._tree()):
            self._sums, self.position = found.state.pop("sums"), Position(**found.extra)
            self._state = TrainState(**found.state)
        self._began = self.position.step
        self._saved_at, self._since = time.monotonic(), time.perf_counter()
        show(self._began, "")

    def run(self) -> Position:
        """Trains to the end, where the last checkpoint is.

        Raises:
          Stopped: SIGTERM came; all is saved.
          UserError: of the data.
        """
        config, at = self._config, self.position
        reader = self._read(self._train, train=True, first_step=at.step)
        with contextlib.closing(self._checkpoints), contextlib.closing(reader):
            while True:
                if at.step in config.evaluations[len(at.history) :]:
                    self._evaluate()
                ended = at.step == config.steps or at.diverged_at is not None
                self._save_if(ended)
                if ended:
                    return at
                self._advance(next(reader))

    def _read(self, records, **options):
        config = self._config
        return batches(
            records, batch_size=config.batch_size, image_size=config.image_size,
            seed=config.seed, process_index=jax.process_index(),
            process_count=jax.process_count(), **options,
            workers=cores() - 1 if config.workers is None else config.workers,
        )  # fmt: skip

    def _place(self, batch: Batch) -> Placed:
        """A batch over the devices, filled up for these."""
        images, labels, counted = (spread(v, batch_mesh()) for v in batch[:3])
        return images, labels, counted

    def _zero(self):
        return replicate(Sums(*np.zeros(4, np.float32)), batch_mesh())

    def _advance(self, batch):
        config, at = self._config, self.position
        jax.block_until_ready(self._sums)  # of the step before, while this batch was read
        self._state, self._sums = self._net.step(self._state, self._sums, self._place(batch))
        if at.step == self._began:
            self._tick("compilation")
        # In the first epoch every image comes once.
        rows = np.flatnonzero(batch.broken >= 0) * jax.process_count() + jax.process_index()
        self._bad += int((at.step * config.batch_size + rows < len(self._train.data)).sum())
        self._check_bad(self._train, at.bad + self._bad, batch)
        at.step += 1
        if at.step % config.log_every == 0:
            self._show(config.log_every, f"step {at.step:,}, loss {self._look().loss:.3g}")

    def _look(self) -> Sums:
        """Means since the last evaluation; the position knows whether the run has diverged."""
        at, skipped = self.position, int(everyone(self._state.skipped))
        if at.step > at.looked and skipped - at.skipped == at.step - at.looked:
            at.diverged_at = at.looked
        at.looked, at.skipped = at.step, skipped
        return everyone(self._sums).mean()

    def _evaluate(self):
        at, counts, bad, trained = self.position, self._zero(), 0, self._look()
        self._tick("training")
        with contextlib.closing(self._read(self._test, train=False)) as read:
            for batch in read:
                jax.block_until_ready(counts)
                counts = self._net.test(self._state, counts, self._place(batch))
                bad += int((batch.broken >= 0).sum())
                self._check_bad(self._test, bad, batch)
                if self._stop.requested and jax.process_count() == 1:
                    self._save_if(False)
        at.test_bad = total(bad)
        tested = everyone(counts).mean()
        at.history.append({
            "step": at.step, "train_loss": trained.loss, "train_accuracy": trained.accuracy,
            "test_loss": tested.loss, "test_accuracy": tested.accuracy,
            "test_top5_accuracy": tested.top5_accuracy,
        })  # fmt: skip
        if not np.isfinite(tested.loss) and at.diverged_at is None:
            at.diverged_at = at.step
        self._sums = self._zero()
        self._tick("evaluation")
        shown = f"top-1 {tested.accuracy:.1%}, top-5 {tested.top5_accuracy:.1%}"
        self._show(0, f"step {at.step:,}, {shown}")

    def _check_bad(self, records, count, batch):
        if count > (allowed := self._config.max_bad_examples) and batch.broken.max() >= 0:
            raise UserError(
                f"{count} broken images, the last of them {records.name}, example "
                f"{batch.broken.max()}: allow that many with max_bad_examples (now {allowed}), "
                "or prepare the set again"
            )

    def _tick(self, what):
        now = time.perf_counter()
        setattr(self.position, what, getattr(self.position, what) + now - self._since)
        self._since = now

    def _tree(self):
        """The state as it is saved: parameters and statistics where the tools find them."""
        return self._state._asdict() | {"sums": self._sums}

    def _save_if(self, ended):
        """Saves at the end, if it is time, or if SIGTERM came, which ends the training."""
        config, at = self._config, self.position
        # To agree takes the processes longer than a step.
        if jax.process_count() > 1 and at.step % config.log_every and not ended:
            return
        stop = any_process(self._stop.requested) and not ended
        late = at.step > 0 and time.monotonic() - self._saved_at >= config.checkpoint_every
        if ended or stop or any_process(late):
            self._tick("training")
            at.bad, self._bad = at.bad + total(self._bad), 0
            self._checkpoints.save(at.step, self._tree(), dataclasses.asdict(at))
            self._saved_at = time.monotonic()
        if stop:
            raise Stopped
