"""Runs per second of a sweep, beside Keras and beside a plain Flax training loop.

The circles network (Dense 50 ReLU, Dense 1 sigmoid; SGD .01 with momentum .9, batches of
32, 100 epochs of 500 examples) without and with BatchNorm: 100 seeds x 5 learning rates as
one vmapped program per arm, against the single run that Keras 3 does at a time, and the
single run of a jitted step in a Python loop.

Times are whole: ours with compilation and evaluation after each epoch; Keras and Flax with
theirs, evaluation included. `--repeats` runs of each peer follow each other, and the
median counts.
"""

from __future__ import annotations

import functools
import os
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import linen as nn

from bn_jax.data import batch_indices, load
from bn_jax.linen import BatchNorm
from bn_jax.measure import Budget, Point, sweep
from bn_jax.models import MLP
from bn_jax.training.run import Run

SEEDS = flags.DEFINE_integer("seeds", 100, "seeds of our sweep")
EPOCHS = flags.DEFINE_integer("epochs", 100, "epochs of a run")
REPEATS = flags.DEFINE_integer("repeats", 3, "runs of each peer")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
BATCH = 32
# 400 to train on and 100 for validation: all three sides get the same.
VALIDATION = 0.2


def ours(dataset, arm: str, seeds: int, epochs: int) -> tuple[int, float, float]:
    """Runs, seconds, and the median test accuracy at rate .01."""
    per_epoch = dataset.train.labels.size // BATCH

    def model(swept):
        norm = functools.partial(BatchNorm, momentum=swept.momentum)
        return MLP((50,), 1, norm=norm if arm == "bn" else None, places=("after",))

    def batches(key, first_step, num_steps):
        return batch_indices(key, first_step, num_steps, dataset.train.labels.size, BATCH)

    optimizer = functools.partial(optax.sgd, momentum=0.9)
    run = Run(model, optimizer, dataset.scaled, batches)
    points = [Point(rate, 1.0, 0.99) for rate in RATES]
    budget = Budget(steps=epochs * per_epoch, eval_every=per_epoch)
    start = time.perf_counter()
    records = [r for rs in sweep(run, dataset, points, range(seeds), budget) for r in rs]
    seconds = time.perf_counter() - start
    final = [r["test_accuracy"][-1] for r in records if r["learning_rate"] == 0.01]
    return len(records), seconds, statistics.median(final)


def plain_flax(dataset, arm: str, epochs: int, seed: int) -> tuple[float, float]:
    """One run as Flax's own examples write it: a jitted step, called from Python."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(50, kernel_init=nn.initializers.he_uniform())(x))
            if arm == "bn":
                x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(1)(x)[:, 0]

    net, tx = Net(), optax.sgd(0.01, momentum=0.9)
    x, y = (np.asarray(v, np.float32) for v in dataset.train)
    start = time.perf_counter()
    variables = net.init(jax.random.key(seed), x[:1], train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    opt_state = tx.init(params)

    @jax.jit
    def step(params, stats, opt_state, x, y):
        def loss_fn(params):
            out, new = net.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            loss = optax.sigmoid_binary_cross_entropy(out, y).mean()
            return loss, new.get("batch_stats", {})

        grads, stats_ = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state_ = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), stats_, opt_state_

    @jax.jit
    def accuracy(params, stats, x, y):
        out = net.apply({"params": params, "batch_stats": stats}, x, train=False)
        return jnp.mean((out > 0) == (y > 0))

    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for i in range(0, len(x) - BATCH + 1, BATCH):
            rows = order[i : i + BATCH]
            params, stats, opt_state = step(params, stats, opt_state, x[rows], y[rows])
        for split in (dataset.validation, dataset.test):
            result = float(accuracy(params, stats, *split))
    return time.perf_counter() - start, result


def keras_run(dataset, arm: str, epochs: int, seed: int) -> tuple[float, float]:
    """One run of Keras 3 on its JAX backend, as its tutorials write it."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(seed)
    splits = [[np.asarray(v, np.float32) for v in split] for split in dataset[:3]]
    start = time.perf_counter()
    norm = [layers.BatchNormalization()] if arm == "bn" else []
    hidden = layers.Dense(50, activation="relu", kernel_initializer="he_uniform")
    net = keras.Sequential([hidden, *norm, layers.Dense(1, activation="sigmoid")])
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    net.compile(optimizer, loss="binary_crossentropy", metrics=["accuracy"])
    (x, y), validation, test = splits
    net.fit(x, y, validation_data=validation, epochs=epochs, batch_size=BATCH, verbose=0)
    _, result = net.evaluate(*test, verbose=0)
    return time.perf_counter() - start, result


def main(_) -> None:
    """Prints a line for each side and arm, and the ratios."""
    dataset = load("circles", validation_fraction=VALIDATION, scaling="raw")
    jax.block_until_ready(dataset)
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, circles, {EPOCHS.value} epochs")
    for arm in ("none", "bn"):
        runs, seconds, accuracy = ours(dataset, arm, SEEDS.value, EPOCHS.value)
        print(
            f"{arm:5} bn_jax      {runs:4} runs in {seconds:6.2f} s: {runs / seconds:8.2f} "
            f"runs/s, test accuracy {accuracy:.3f}",
            flush=True,
        )
        for name, peer in (("plain Flax", plain_flax), ("Keras 3", keras_run)):
            results = [peer(dataset, arm, EPOCHS.value, s) for s in range(REPEATS.value)]
            each = statistics.median(t for t, _ in results)
            print(
                f"{arm:5} {name:11} one run in {each:7.2f} s: {1 / each:8.2f} runs/s, "
                f"test accuracy {statistics.median(a for _, a in results):.3f}; "
                f"bn_jax / {name} = {runs / seconds * each:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
