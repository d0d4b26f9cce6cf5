"""How airbench94 trains its network (Jordan 2024, arXiv:2404.00498), as a `Run`.

SGD with Nesterov momentum whose rate rises and falls linearly; weight decay that is the same
at any rate; biases of norms at a rate of their own; the whitening layer's bias frozen after
three epochs; Lookahead over weights and running statistics; each image mirrored in every other
epoch, and moved by up to two pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bn_jax.errors import UserError
from bn_jax.lab.arms import Arm, build_run, load_data
from bn_jax.lab.data import Dataset, Split, batch_indices
from bn_jax.lab.models.airbench import whitening_kernel
from bn_jax.lab.training.run import Run, RunState, Swept

if TYPE_CHECKING:
    from experiments.cifar_speedrun import Config

KILO = 1024  # examples that the learning rate is for
MOMENTUM = 0.85
# Factors on the rate at the start, at the peak and at the end; and the peak's place.
RATES, PEAK = (0.2, 1.0, 0.07), 0.23
WHITENED = 5000  # images whose patches the first layer whitens
EPOCHS = 3  # after which its bias is frozen, and Lookahead begins
# Held out to choose on where all examples are for training: some of those.
VALIDATION = 1000

EVERY, DECAY, POWER = 5, 0.95, 3  # of Lookahead


def load(config: Config) -> Dataset:
    """The dataset; its training images twice, the second time mirrored.

    Without a validation set the first 1,000 training images stand in for it.
    """
    dataset = load_data(config)
    inputs, labels = dataset.train
    if inputs.ndim != 4:
        raise UserError(f"--dataset={config.dataset}: choose one of images")
    if config.validation_fraction == 0:
        few = Split(inputs[:VALIDATION], labels[:VALIDATION])
        dataset = dataset._replace(validation=few)
    if config.translate >= inputs.shape[1]:
        raise UserError(
            f"--translate={config.translate}: images of {config.dataset} have "
            f"{inputs.shape[1]} pixels, choose fewer"
        )
    both = jnp.concatenate([inputs, inputs[:, :, ::-1]]), jnp.concatenate([labels, labels])
    return dataset._replace(train=Split(*both))


def per_epoch(config: Config, dataset: Dataset) -> int:
    """Batches in an epoch; the dataset is that of `load`."""
    return dataset.train.labels.size // 2 // config.batch_size


def build(config: Config, arm: Arm, dataset: Dataset) -> Lookahead:
    """The arm's run; the dataset is that of `load`."""
    own = arm.config(config)
    epoch = per_epoch(own, dataset)
    kernel = whitening_kernel(dataset.scaled(dataset.train.inputs[:WHITENED]))
    network = {"whitening": kernel, "views": own.views, "dtype": jnp.dtype(own.dtype)}
    run = build_run(config, arm._replace(model=network), dataset)
    make = functools.partial(
        optimizer, batch_size=own.batch_size, steps=own.steps, frozen_at=EPOCHS * epoch,
        weight_decay=own.weight_decay, bias_rate=own.bias_rate,
    )  # fmt: skip
    batches = functools.partial(
        alternating, examples=dataset.train.labels.size // 2, batch_size=own.batch_size
    )
    return Lookahead(
        run.model, make, run.scaled, batches, run.loss,
        augment=functools.partial(translate, own.translate),
        steps=own.steps, epoch=epoch, begin=EPOCHS * epoch,
    )  # fmt: skip


def optimizer(
    rate: jax.Array | float,
    *,
    batch_size: int,
    steps: int,
    frozen_at: int,
    weight_decay: float,
    bias_rate: float,
) -> optax.GradientTransformation:
    """Nesterov's momentum .85 for the gradient of a batch's mean loss.

    The rate of a step is `rate` batch_size / 1024 / (1 + 1 / (1 - .85)), times `triangle`:
    a gradient of the sum of the losses that stays the same moves the weights by .87 (1 / (2 -
    .85)) of `rate` / 1024 for each example.

    Args:
      rate: for 1,024 examples; may be traced.
      batch_size, steps: of the run.
      frozen_at: the step from which the whitening layer's bias stays as it is.
      weight_decay: as `rate`, and times `triangle` too: not relative to the rate.
      bias_rate: factor on the rate of the biases of norms, and not on their decay.
    """
    step = rate * batch_size / KILO / (1 + 1 / (1 - MOMENTUM))

    def sgd(factor=1.0):
        return optax.chain(
            optax.add_decayed_weights(weight_decay / (factor * rate)),
            optax.trace(MOMENTUM, nesterov=True),
            optax.scale_by_learning_rate(lambda count: factor * step * triangle(count, steps)),
        )

    until = optax.scale_by_schedule(
        lambda count: jnp.where(jnp.less(count, frozen_at), 1.0, 0.0)
    )
    rules: dict[Hashable, optax.GradientTransformation] = {
        "rest": sgd(),
        "norm": sgd(bias_rate),
        "whitening": optax.chain(sgd(), until),
    }
    return optax.partition(rules, groups)


def groups(params: Any) -> Any:
    """`norm` for the biases of norms, `whitening` for the first layer's, `rest` for others."""

    def group(path, _):
        layer, name = path[0].key, path[-1].key
        if name != "bias" or layer.startswith("Conv"):
            return "rest"
        return "whitening" if layer.startswith("Whitening") else "norm"

    return jax.tree_util.tree_map_with_path(group, params)


def triangle(count: jax.typing.ArrayLike, steps: int) -> jax.Array:
    """Linearly from .2 to 1 at 23 % of the steps, and down to .07 at their end."""
    places = jnp.array([0, max(int(PEAK * steps), 1), steps])
    return jnp.interp(count, places, jnp.array(RATES))


def alternating(
    key: jax.Array, first_step: jax.Array, num_steps: int, *, examples: int, batch_size: int
) -> jax.Array:
    """`batch_indices` where example i, mirrored, is example `examples` + i.

    A coin for each image decides whether it is mirrored in the first epoch, and from then on
    it is so in every other one: in two epochs the network sees both.
    """
    order, coin = jax.random.split(key)
    rows = batch_indices(order, first_step, num_steps, examples, batch_size)
    epochs = (first_step + jnp.arange(num_steps)) // (examples // batch_size)
    mirrored = jax.random.bernoulli(coin, shape=(examples,))[rows] ^ (epochs % 2 == 1)[:, None]
    return rows + examples * mirrored


def translate(pixels: int, key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image by whole pixels, up to so many; edges are reflected."""
    n, height, width, channels = images.shape
    edges = (pixels, pixels)
    padded = jnp.pad(images, ((0, 0), edges, edges, (0, 0)), mode="reflect")
    starts = jax.random.randint(key, (n, 2), 0, 2 * pixels + 1)
    size = (height, width, channels)
    return jax.vmap(lambda v, at: lax.dynamic_slice(v, (*at, 0), size))(padded, starts)


class Slow(NamedTuple):
    """The optimizer's state, and slow parameters and running statistics."""

    optimizer: Any
    average: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookahead(Run):
    """A run drawn back to a slow average of its parameters and running statistics.

    After every fifth step t past `begin` (Zhang et al. 2019, "Lookahead optimizer"; here, as in
    Jordan 2024, arXiv:2404.00498, the old value's weight grows, and running statistics are
    averaged too):

        slow = d slow + (1 - d) fast, fast = slow,    d = .95^5 (t / steps)^3

    After the first such step slow is fast. At the end of an epoch, and of the run, fast is
    slow: what the steps since the average did is dropped, as in the source's code.

    Attributes:
      steps: of the run.
      epoch: steps in an epoch.
      begin: steps without it.
      others: as in `Run`.
    """

    steps: int
    epoch: int
    begin: int

    def init(self, key: jax.Array, swept: Swept, inputs: jax.Array) -> RunState:
        """As `Run.init`."""
        state = super().init(key, swept, inputs)
        return _replace(state, opt_state=Slow(state.train.opt_state, _weights(state)))

    def step(self, state: RunState, *args: Any, **kwargs: Any) -> RunState:
        """As `Run.step`."""
        inner, slow = state.train.opt_state
        state = super().step(_replace(state, opt_state=inner), *args, **kwargs)
        t = state.train.step
        decay = jnp.where(t - EVERY > self.begin, DECAY**EVERY * (t / self.steps) ** POWER, 0.0)
        averaged, fast = t % EVERY == 0, _weights(state)
        slow = jax.tree.map(
            lambda s, f: jnp.where(averaged, decay * s + (1 - decay) * f, s), slow, fast
        )
        due = averaged | (t % self.epoch == 0) | (t == self.steps)
        due &= (t // EVERY * EVERY > self.begin) & (state.diverged_at < 0)
        params, stats = jax.tree.map(functools.partial(jnp.where, due), slow, fast)
        return _replace(
            state, params=params, batch_stats=stats, opt_state=Slow(state.train.opt_state, slow)
        )


def _weights(state):
    return state.train.params, state.train.batch_stats


def _replace(state, **fields):
    return state._replace(train=state.train._replace(**fields))
