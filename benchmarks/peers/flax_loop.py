"""A plain Flax loop's side: a jitted step, called from Python on batches made by numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.peers import CLASSES, SHIFT, Task


class Mlp(nn.Module):
    """BatchNorm before each sigmoid, in place of a bias."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        for width in self.features:
            x = nn.Dense(width, use_bias=False)(x)
            x = nn.sigmoid(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(CLASSES)(x)


class CifarA(nn.Module):
    """BatchNorm after each ReLU, as in `bn_jax.lab.models.CifarA`."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train):
        *channels, width, last = self.features

        def norm_of_relu(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.relu(x))

        def drop(rate, x):
            return nn.Dropout(rate, deterministic=not train)(x)

        for c in channels:
            for _ in range(2):
                x = norm_of_relu(nn.Conv(c, (3, 3))(x))
            x = drop(0.25, nn.max_pool(x, (2, 2), (2, 2)))
        x = drop(0.5, norm_of_relu(nn.Dense(width)(x.reshape(len(x), -1))))
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(last)(x)))


def prepare(task: Task) -> dict[str, Callable[[], Any]]:
    """The programs."""
    net = (Mlp if task.sgd else CifarA)(task.features)
    tx = (optax.sgd if task.sgd else optax.adam)(task.learning_rate)
    images, labels = task.examples()
    variables = net.init(jax.random.key(0), unit(images[:2]), train=False)
    params, stats = variables["params"], variables["batch_stats"]
    state, rng = [params, stats, tx.init(params)], np.random.default_rng(0)

    @functools.partial(jax.jit, static_argnames="augment")
    def update(params, stats, opt_state, key, x, y, augment):
        noise, dropout = jax.random.split(key)
        x = moved(noise, unit(x)) if augment else unit(x)

        def loss_of(params):
            outputs, new = net.apply(
                {"params": params, "batch_stats": stats}, x, train=True,
                mutable=["batch_stats"], rngs={"dropout": dropout},
            )  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
            return losses.mean(), new["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    key, batch = jax.random.key(1), jax.device_put((images[: task.batch], labels[: task.batch]))

    def step():
        return jax.block_until_ready(update(*state, key, *batch, augment=False))

    def epoch():
        order = rng.permutation(task.images)
        for i in range(task.steps):
            rows = order[i * task.batch : (i + 1) * task.batch]
            at = jax.random.fold_in(key, i)
            *state[:], loss = update(
                *state, at, images[rows], labels[rows], augment=task.augment
            )
        return jax.block_until_ready(loss)

    count = sum(v.size for v in jax.tree.leaves(params))
    return {"step": step, "epoch": epoch, "parameters": lambda: count}


def unit(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [0, 1]."""
    return jnp.asarray(images, jnp.float32) / 255


def moved(key: jax.Array, x: jax.Array) -> jax.Array:
    """Each image shifted by up to `SHIFT` pixels, and mirrored or not."""
    place, mirror = jax.random.split(key)
    padded = jnp.pad(x, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    starts = jax.random.randint(place, (len(x), 2), 0, 2 * SHIFT + 1)
    x = jax.vmap(lambda v, s: jax.lax.dynamic_slice(v, (*s, 0), x.shape[1:]))(padded, starts)
    flips = jax.random.bernoulli(mirror, shape=(len(x), 1, 1, 1))
    return jnp.where(flips, x[:, :, ::-1], x)
