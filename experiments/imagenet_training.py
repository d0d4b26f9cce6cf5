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
from bn_jax.lab.arms import Arm, rule_of
from bn_jax.lab.data.stream import Batch, Records, batches
from bn_jax.lab.flags import Stopped
from bn_jax.lab.models import FAMILIES
from bn_jax.lab.statistics import Record
from bn_jax.lab.statistics.records import Series
from bn_jax.lab.sweeps.threaded import cores
from bn_jax.lab.training.checkpoint import Checkpoints
from bn_jax.lab.training.distributed import any_process, everyone
from bn_jax.lab.training.metrics import correct, cross_entropy, in_top
from bn_jax.lab.training.parallel import batch_mesh, replicate, spread
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
Placed = tuple[jax.Array, ...]  # images, labels, which count, which are broken


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNetRecord(Record):
    """A run, with its top-5 accuracy, the broken images left out and the steps skipped."""

    test_top5_accuracy: Series
    bad_examples: int
    skipped_steps: int


class Sums(NamedTuple):
    """Sums over batches in training, over examples in a test; `count` is how many.

    `broken` is the number of broken images.
    """

    loss: Any
    accuracy: Any
    top5_accuracy: Any
    count: Any
    broken: Any

    def mean(self) -> Sums:
        """Means; NaN of nothing. `broken` stays."""
        count = float(self.count) or np.nan
        means = Sums(*(float(v) / count for v in self))
        return means._replace(broken=int(self.broken))


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
    rule = optimizer(config, warmup)
    loss = functools.partial(cross_entropy, label_smoothing=config.label_smoothing)
    image = config.image_size, config.image_size, 3

    def init(seed):
        return init_state(jax.random.key(seed), model, rule, jnp.zeros((1, *image)))

    def step(state, sums, batch):
        images, labels, counted, broken = batch
        after, means = train_step(
            state, standardised(images), labels, model, rule, loss=loss, counted=counted
        )
        kept, found = after.skipped == state.skipped, Sums(*means, 0.0, 1.0, 0.0)
        sums = jax.tree.map(lambda s, v: s + jnp.where(kept, v, 0), sums, found)
        return after, sums._replace(broken=sums.broken + broken.sum(dtype=jnp.float32))

    def test(state, sums, batch):
        images, labels, counted, broken = batch
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        outputs = model.apply(variables, standardised(images), train=False)
        hits, top5 = correct(outputs, labels), in_top(outputs, labels, 5)
        values = cross_entropy(outputs, labels), hits, top5, jnp.ones_like(labels)
        found = [jnp.where(counted, v, 0) for v in values]
        added = (v.sum(dtype=jnp.float32) for v in (*found, broken))
        return jax.tree.map(jnp.add, sums, Sums(*added))

    name = f"--model={config.model} --width={config.width:g} --image_size={config.image_size}"
    sizes.check_batch(f"--batch_size={config.batch_size} {name}", (config.batch_size, *image))
    try:
        sizes.check_network(name, jax.eval_shape(init, jnp.int32(0)))
    except (OverflowError, TypeError, ValueError) as e:
        raise UserError(f"{name}: {e}") from e
    jit = functools.partial(jax.jit, out_shardings=NamedSharding(batch_mesh(), P()))
    return Network(jit(init), jit(step, donate_argnums=(0, 1)), jit(test))


def optimizer(config: Config, warmup: int) -> optax.GradientTransformation:
    """That of the flags, with `goyal` among the schedules."""
    steps, own = config.evaluations[-1], config.changed({"warmup_steps": warmup})
    if config.schedule != "goyal":
        return rule_of(own, steps)(config.highest_rate)
    rule = rule_of(own.changed({"schedule": "constant"}), steps)(config.highest_rate)
    drops = {steps * drop // OF: 0.1 for drop in DROPS}
    return optax.chain(
        rule, optax.scale_by_schedule(optax.piecewise_constant_schedule(1.0, drops))
    )


def standardised(images: jax.Array) -> jax.Array:
    """From uint8 `[n, height, width, 3]` to float32 of mean 0 and variance 1 on ImageNet."""
    mean, std = (jnp.array(v).reshape(1, 1, 1, 3) for v in (MEAN, STD))
    return (images.astype(jnp.float32) / 255 - mean) / std


@dataclasses.dataclass
class Position:
    """Where a training is, beside its state.

    Attributes:
      step, history: steps that were done; of the evaluations so far, numbers by name.
      bad, test_bad: broken images up to the last evaluation, each counted once.
      diverged_at: the evaluation since which all steps are skipped, or whose loss is not
        finite.
      training, evaluation, compilation: seconds.
    """

    step: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    bad: int = 0
    test_bad: int = 0
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

    Attributes:
      state: parameters and statistics, as the checkpoints have them.
      position: where it is.
    """

    def __init__(
        self, config: Config, train: Records, test: Records, net: Network, folder: Path,
        stop: Stop, show: Callable[[int, str], None],
    ):  # fmt: skip
        self._config, self._train, self._test, self._net = config, train, test, net
        self._stop, self._show, self._checkpoints = stop, show, Checkpoints(folder)
        self.state, self.position = net.init(jnp.int32(config.seed)), Position()
        self._zero = replicate(Sums(*np.zeros(5, np.float32)), batch_mesh())
        self._sums = jax.tree.map(jnp.copy, self._zero)  # as it is donated
        if found := self._checkpoints.restore(self._tree()):
            self._sums, self.position = found.state.pop("sums"), Position(**found.extra)
            self.state = TrainState(**found.state)
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

    def _advance(self, batch):
        config, at = self._config, self.position
        jax.block_until_ready(self._sums)  # of the step before, while this batch was read
        # In the first epoch every image comes once.
        rows = np.arange(len(batch.labels)) * jax.process_count() + jax.process_index()
        new = at.step * config.batch_size + rows < len(self._train.data)
        self.state, self._sums = self._net.step(self.state, self._sums, placed(batch, new))
        self._check_broken(self._train, batch, self._sums, at.bad)
        if at.step == self._began:
            self._tick("compilation")
        at.step += 1
        if at.step % config.log_every == 0:
            self._show(config.log_every, f"step {at.step:,}, loss {self._look().loss:.3g}")

    def _look(self) -> Sums:
        """Means since the last evaluation; the position knows whether the run has diverged."""
        at, found = self.position, everyone(self._sums)
        last = at.history[-1]["step"] if at.history else 0
        if at.step > last and not found.count:
            at.diverged_at = int(last)
        return found.mean()

    def _evaluate(self):
        at, sums, trained = self.position, self._zero, self._look()
        self._tick("training")
        with contextlib.closing(self._read(self._test, train=False)) as read:
            for batch in read:
                jax.block_until_ready(sums)
                sums = self._net.test(self.state, sums, placed(batch))
                self._check_broken(self._test, batch, sums)
                if self._stop.requested and jax.process_count() == 1:
                    self._save_if(False)
        tested = everyone(sums).mean()
        at.bad, at.test_bad = at.bad + trained.broken, tested.broken
        at.history.append({
            "step": at.step, "train_loss": trained.loss, "train_accuracy": trained.accuracy,
            "test_loss": tested.loss, "test_accuracy": tested.accuracy,
            "test_top5_accuracy": tested.top5_accuracy,
        })  # fmt: skip
        if not np.isfinite(tested.loss) and at.diverged_at is None:
            at.diverged_at = at.step
        self._sums = jax.tree.map(jnp.copy, self._zero)
        self._tick("evaluation")
        shown = f"top-1 {tested.accuracy:.1%}, top-5 {tested.top5_accuracy:.1%}"
        self._show(0, f"step {at.step:,}, {shown}")

    def _check_broken(self, records, batch, sums, before=0):
        """Raises a UserError where the batch has one too many."""
        last, allowed = batch.broken.max(), self._config.max_bad_examples
        if last >= 0 and (count := before + int(everyone(sums.broken))) > allowed:
            raise UserError(
                f"{count} broken images, the last of them {records.name}, example {last}: "
                f"allow that many with max_bad_examples (now {allowed}), or prepare the set "
                "again"
            )

    def _tick(self, what):
        now = time.perf_counter()
        setattr(self.position, what, getattr(self.position, what) + now - self._since)
        self._since = now

    def _tree(self):
        """The state as it is saved: parameters and statistics where the tools find them."""
        return self.state._asdict() | {"sums": self._sums}

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
            self._checkpoints.save(at.step, self._tree(), dataclasses.asdict(at))
            self._saved_at = time.monotonic()
        if stop:
            raise Stopped


def placed(batch: Batch, new: np.ndarray | bool = True) -> Placed:
    """A batch over the devices, filled up for these; broken are those that are `new`."""
    rows = batch.images, batch.labels, batch.counted, (batch.broken >= 0) & new
    return tuple(spread(v, batch_mesh()) for v in rows)
