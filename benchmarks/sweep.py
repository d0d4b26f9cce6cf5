"""Circles: 600 runs from the start of the process to its report, and runs/s beside the peers.

`python -m experiments.circles` is timed whole: 6 arms x 100 seeds x 100 epochs, imports,
compilation, figures and the page included; first with no compiled programs kept, then with
those of the start before. Below are runs per second of one arm at a time, compilation and an
evaluation after every epoch included: 5 learning rates with 100 seeds and with 400, as one
vmapped program, beside a jitted Flax step in a Python loop and Keras 3 on JAX, which train one
run at a time. What compilation takes is the same for any number of runs.

The network is Dense 50 ReLU, with BatchNorm or without, Dense 1 sigmoid; SGD .01 with momentum
.9, batches of 32 of 400 examples. Medians of some repetitions.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.start import timed
from benchmarks.where import describe_machine
from bn_jax.data import batch_indices, load
from bn_jax.linen import BatchNorm
from bn_jax.measure import Budget, Point, sweep
from bn_jax.models import MLP
from bn_jax.report.markdown import table
from bn_jax.report.text import padded
from bn_jax.training.run import Run
from experiments import flags
from experiments.flags import flag

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
BATCH = 32
# 400 to train on and 100 for validation: all three sides get the same.
VALIDATION = 0.2
SEEDS = 100  # of the whole command
AIM_SECONDS, AIM_KERAS = 20, 300  # of the whole command; times Keras' runs/s


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.sweep --help`."""

    seeds: tuple[int, ...] = flag((100, 400), "seeds of our sweeps")
    epochs: int = flag(100, "epochs of a run")
    whole: bool = flag(True, "time the whole command")
    starts: int = flag(
        3, "times that the whole command is timed, with programs kept and without"
    )
    repeats: int = flag(3, "how often each is timed")


def run(config: Config) -> dict[str, float]:
    """Prints two tables; seconds of the whole command and ratios to the peers come back."""
    print(describe_machine("flax", "keras") + "\n")
    return (whole(config) if config.whole else {}) | beside_peers(config)


def whole(config: Config) -> dict[str, float]:
    """Seconds of the experiment, by whether compiled programs were kept."""
    seconds: dict[str, list[float]] = {"none kept": [], "kept": []}
    for _ in range(config.starts):
        with tempfile.TemporaryDirectory() as folder:
            for name, times in seconds.items():
                times.append(timed(command(config.epochs, Path(folder), name)))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [[name, padded(s), padded(6 * SEEDS / s)] for name, s in medians.items()]
    header = ["compiled programs", f"seconds (aim {AIM_SECONDS})", "runs/s"]
    print(table(header, rows))
    return medians


def command(epochs: int, folder: Path, name: str) -> tuple[str, ...]:
    """Arguments of Python."""
    steps = epochs * (500 // BATCH)
    return (
        "-m", "experiments.circles", f"--seeds={SEEDS}", f"--steps={steps}",
        f"--cache_dir={folder / 'cache'}", f"--workdir={folder / name}",
    )  # fmt: skip


def beside_peers(config: Config) -> dict[str, float]:
    """Our runs/s over each peer's, by arm, runs and peer."""
    dataset = load("circles", validation_fraction=VALIDATION, scaling="raw")
    jax.block_until_ready(dataset)
    peers = {"plain Flax": plain_flax, "Keras 3": keras_run}
    rows, ratios = [], {}

    def timed_runs(train, *more):
        each = [train(dataset, arm, config.epochs, *more, s) for s in range(config.repeats)]
        return tuple(map(statistics.median, zip(*each, strict=True)))

    for arm in ("none", "bn"):
        alone = {name: timed_runs(train) for name, train in peers.items()}
        for seeds in config.seeds:
            runs = len(RATES) * seeds
            seconds, accuracy = timed_runs(ours, seeds)
            over = {name: runs / seconds * each for name, (each, _) in alone.items()}
            ratios |= {f"{arm}, {runs} runs, {name}": ratio for name, ratio in over.items()}
            rows.append(_row(f"{arm}, bn_jax", runs, seconds, accuracy, over.values()))
        rows += [_row(f"{arm}, {name}", 1, *found, ()) for name, found in alone.items()]
    header = ["arm, side", "runs", "seconds", "runs/s", "test accuracy"]
    print(table([*header, *(f"over {name}" for name in peers)], rows))
    print(f"Aim: {AIM_KERAS} times Keras' runs/s.\n")
    return ratios


def _row(name, runs, seconds, accuracy, over):
    times = [padded(seconds), padded(runs / seconds)]
    over = [f"{ratio:.0f}" for ratio in over] or ["", ""]
    return [name, f"{runs:,}", *times, f"{accuracy:.3f}", *over]


def ours(dataset, arm: str, epochs: int, seeds: int, first: int) -> tuple[float, float]:
    """Seconds of all runs, and the median test accuracy at rate .01."""
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
    swept = sweep(run, dataset, points, range(first, first + seeds), budget)
    records = [r for rs in swept for r in rs]
    seconds = time.perf_counter() - start
    final = [r["test_accuracy"][-1] for r in records if r["learning_rate"] == 0.01]
    return seconds, statistics.median(final)


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


if __name__ == "__main__":
    flags.main(Config, run)
