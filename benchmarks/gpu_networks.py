"""Training steps of whole networks for `benchmarks.gpu`, and what BatchNorm takes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu_timer import Row, Timer
from benchmarks.peers import ours
from benchmarks.peers.task import Task
from bn_jax.data import Split, load
from bn_jax.errors import UserError
from bn_jax.linen import BatchNorm
from bn_jax.models import Inception, ResNet50
from bn_jax.training.optimizers import optimizer
from bn_jax.training.run import Swept
from bn_jax.training.state import TrainState
from bn_jax.training.step import init_state, train_step
from bn_jax.training.xla import run_once

OURS, WITHOUT = "bn_jax", "none"
NORMS = {OURS: BatchNorm, WITHOUT: None, "flax": nn.BatchNorm}
RULE, RATE = "sgd_momentum", 0.1
# With a scale of 0 in a block's last norm a good part of what is multiplied would be zeros,
# on which a GPU is faster.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ResNet-50": functools.partial(ResNet50, zero_init_last=False),
    "BN-Inception": Inception,
}
CLASSES = 10  # of CIFAR-10


def with_and_without_norm(
    name: str, batch: int, size: int, timed: Timer, calls: int
) -> list[Row]:
    """A row for each of `NORMS` in a network: a training step in bfloat16 on random images.

    `images_per_second`, and `share` of the norms: (t - u) / t where the step takes t, and u
    without norms; None where one of them is not known. (Convolutions without a norm after
    them have a bias, so what u saves is a little less than what the norms take.)
    """
    data = functools.cache(functools.partial(random_batch, batch, size))
    # Variables have the same names in both norms, so that two states do for three networks.
    start = functools.cache(lambda norm: started(name, norm, data()[0][:1]))
    makers = {
        n: functools.partial(training_step, name, norm, data, start)
        for n, norm in NORMS.items()
    }
    found = timed(makers, calls)
    without = found[WITHOUT]["seconds"]
    rows = []
    for norm, timing in found.items():
        own = timing["seconds"]
        known = own and without and norm != WITHOUT
        rows.append({
            "network": name, "norm": norm, **timing,
            "images_per_second": own and batch / own,
            "share": (own - without) / own if known else None,
        })  # fmt: skip
    return rows


def random_batch(batch: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Images `[batch, size, size, 3]` in bfloat16, and labels."""
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (batch, size, size, 3), jnp.bfloat16)
    return images, jax.random.randint(keys[1], (batch,), 0, CLASSES)


def network(name: str, norm: Any) -> nn.Module:
    """In bfloat16."""
    return NETWORKS[name](norm=norm, dtype=jnp.bfloat16)


def first_state(name: str, norm: Any, key: jax.Array, example: jax.Array) -> TrainState:
    """Of a network for images like the example, `[1, height, width, 3]`."""
    return init_state(key, network(name, norm), optimizer(RULE, RATE), example)


def started(name: str, norm: Any, example: jax.Array) -> TrainState:
    """`first_state`, always with the same weights."""
    init = functools.partial(first_state, name, norm)
    return jax.jit(init, compiler_options=run_once())(jax.random.key(1), example)


def training_step(
    name: str,
    norm: Any,
    data: Callable[[], tuple[jax.Array, jax.Array]],
    start: Callable[[Any], TrainState],
) -> Callable[[], Any]:
    """Its call gives the state after the first step of a run, and `Metrics` before it.

    `start` is given a norm whose variables have the names of this one's.
    """
    state, step = start(norm and BatchNorm), step_of(name, norm)
    return functools.partial(jax.jit(step), state, *data())


def step_of(name: str, norm: Any) -> Callable[..., Any]:
    """(state, images, labels) to the state after a training step, and `Metrics` before it."""
    model, tx = network(name, norm), optimizer(RULE, RATE)
    return functools.partial(train_step, model=model, optimizer=tx)


def cifar10(
    examples: int, data_dir: str | None = None, cache_dir: str | None = None
) -> tuple[Split, str]:
    """So many training images on the device, random ones where there are no others; which."""
    try:
        found = load(
            "cifar10", validation_fraction=0, train_examples=examples, data_dir=data_dir,
            cache_dir=cache_dir,
        )  # fmt: skip
        return found.train, "CIFAR-10"
    except (UserError, OSError):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (examples, 32, 32, 3), np.uint8)
        labels = rng.integers(0, CLASSES, examples, np.int32)
        return Split(*jax.device_put((images, labels))), "random images"


def network_a(
    features: tuple[int, ...], batch: int, split: Split, timed: Timer, calls: int
) -> list[Row]:
    """Rows of a step and of an epoch, as one program and as a call for each step.

    All include reading the batch from the split on the device, scaling, augmentation (shift
    and flip), dropout and Adam; an epoch its permutation as well.
    """
    n = split.labels.size
    steps = n // batch
    image = split.inputs.shape[1:]
    run = ours.training(Task("cifar_a", features, image, n, batch, augment=True))
    swept, key = Swept(*np.float32([1e-3, 1, 0.99])), jax.random.key(0)
    init = jax.jit(run.init, compiler_options=run_once())
    start = functools.cache(lambda: init(key, swept, split.inputs))
    order = jax.jit(lambda key: run.batches(key, 0, steps))
    step = jax.jit(lambda state, split, rows, i: run.step(state, swept, split, rows[i]))

    @jax.jit
    def scanned(state, split, key):
        def body(state, rows):
            return run.step(state, swept, split, rows), None

        return lax.scan(body, state, order(key))[0]

    def called():
        state, rows = start(), order(key)
        for i in range(steps):
            state = step(state, split, rows, np.int32(i))
        return state

    one = {"step": lambda: functools.partial(step, start(), split, order(key), np.int32(0))}
    epochs = {
        "epoch, one program": lambda: functools.partial(scanned, start(), split, key),
        "epoch, a call for each step": lambda: called,
    }
    found = timed(one, calls) | timed(epochs, 1)
    images = {name: batch * (1 if name in one else steps) for name in found}
    return [
        {
            "what": name, **timing,
            "images_per_second": timing["seconds"] and images[name] / timing["seconds"],
        }
        for name, timing in found.items()
    ]  # fmt: skip
