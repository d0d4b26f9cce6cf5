"""Circles: 600 runs from the start of the process to its report, and runs/s beside the peers.

`python -m experiments.circles` is timed whole: 6 arms x 100 seeds x 100 epochs, imports,
compilation, figures and the page included; at every start first with no compiled programs kept,
then with those that this one left. Medians over 7 starts (`--starts`).

Below, one arm at a time: 5 learning rates with 100 seeds and with 400, as one vmapped program,
beside a jitted Flax step in a Python loop and Keras 3 on JAX, which train one run at a time, at
rate .01. All take turns in one process, which has trained each before: once in every round, in
an order drawn anew. What counts is the median over 7 rounds (`--repeats`), of times and of
ratios within a round.

Most of a peer's run is compilation here, and much of ours. So every side has two times.
`whole`: its programs are compiled as well. `compiled`: they are there already. For bn_jax that
is the whole without what it records as compilation. For a peer it is a run of its own: new
weights and another order of the data, by the jitted functions of the run before (Flax) or by
the model of the run before, its weights drawn anew and its momenta 0 (Keras). The ratios are of
runs per second:

- `whole`: the peer compiles for every run, as a script does that is started once for each;
  bn_jax once for all of them. The aim is about this one.
- `once`: the peer trains as many runs in a loop and compiles for the first only.
- `compiled`: nobody compiles.

The network is Dense 50 ReLU, with BatchNorm or without, Dense 1 sigmoid; SGD .01 with momentum
.9, batches of 32 of 400 examples. bn_jax and Flax evaluate validation and test examples after
every epoch, Keras the validation examples, and those of the test at the end. Keras is left as
its tutorials have it: it trains on the 16 examples left over in an epoch too, a 13th step, and
compiles for this size of a batch as well.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
from bn_jax.measure.timing import interleave, median_ratio
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
OURS, AGAIN = "bn_jax", "again"
PEERS = ("plain Flax", "Keras 3")
WAYS = ("whole", "once", "compiled")


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.sweep --help`."""

    seeds: tuple[int, ...] = flag((100, 400), "seeds of our sweeps")
    epochs: int = flag(100, "epochs of a run")
    whole: bool = flag(True, "time the whole command")
    starts: int = flag(
        7, "times that the whole command is timed, with programs kept and without"
    )
    repeats: int = flag(7, "rounds, in each of which every side is timed once")


class Side(NamedTuple):
    """What some rounds found of one side.

    Attributes:
      runs: trained in a round.
      whole, compiled: their seconds in every round, with compilation and without.
      accuracy: of the test, the median over the rounds at rate .01.
    """

    runs: int
    whole: list[float]
    compiled: list[float]
    accuracy: float


class Outcome(NamedTuple):
    """The test accuracy at rate .01, and seconds of compilation where they are known."""

    accuracy: float
    compilation: float = 0.0


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
    """Our runs/s over each peer's, by arm, runs, peer and way."""
    dataset = load("circles", validation_fraction=VALIDATION, scaling="raw")
    jax.block_until_ready(dataset)
    rows, ratios = [], {}
    for arm in ("none", "bn"):
        sides = measure(dataset, arm, config)
        for name, side in sides.items():
            mine = name not in PEERS
            found = {peer: over(side, sides[peer]) for peer in PEERS} if mine else {}
            rows.append(_row(f"{arm}, {OURS if mine else name}", side, found))
            ratios |= {
                f"{arm}, {side.runs} runs, {peer}, {way}": ratio
                for peer, by_way in found.items()
                for way, ratio in by_way.items()
            }
    header = ["arm, side", "runs", "seconds whole", "compiled", "runs/s whole", "test accuracy"]
    print(table([*header, *(f"over {peer}: {' / '.join(WAYS)}" for peer in PEERS)], rows))
    print(f"Aim: {AIM_KERAS} times Keras' runs/s, whole.\n")
    return ratios


def _row(name, side, found):
    whole, compiled = statistics.median(side.whole), statistics.median(side.compiled)
    over = [" / ".join(map(padded, by_way.values())) for by_way in found.values()]
    seconds = [padded(whole), padded(compiled), padded(side.runs / whole)]
    return [name, f"{side.runs:,}", *seconds, f"{side.accuracy:.3f}", *(over or ["", ""])]


def over(mine: Side, peer: Side) -> dict[str, float]:
    """Our runs/s over a peer's, each way: medians of the ratios within a round."""
    more = mine.runs - 1
    pairs = (
        ([mine.runs * first for first in peer.whole], mine.whole),
        ([f + more * a for f, a in zip(peer.whole, peer.compiled, strict=True)], mine.whole),
        ([mine.runs * again for again in peer.compiled], mine.compiled),
    )
    return {
        way: median_ratio({"theirs": theirs, OURS: ours}, "theirs", OURS)
        for way, (theirs, ours) in zip(WAYS, pairs, strict=True)
    }


def measure(dataset: Any, arm: str, config: Config) -> dict[str, Side]:
    """Our sides by their number of seeds, as text, and the peers by name."""
    entered = contestants(dataset, arm, config)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in entered}

    def call(name):
        # Every call has seeds that it has not had before.
        outcomes[name].append(entered[name](len(outcomes[name])))

    calls = {name: functools.partial(call, name) for name in entered}
    seconds = interleave(calls, config.repeats)
    counted = {name: found[-config.repeats :] for name, found in outcomes.items()}
    sides = {}
    for seeds in map(str, config.seeds):
        pairs = zip(seconds[seeds], counted[seeds], strict=True)
        compiled = [whole - outcome.compilation for whole, outcome in pairs]
        runs = len(RATES) * int(seeds)
        sides[seeds] = Side(runs, seconds[seeds], compiled, _accuracy(counted[seeds]))
    for peer in PEERS:
        again = f"{peer} {AGAIN}"
        accuracy = _accuracy(counted[peer] + counted[again])
        sides[peer] = Side(1, seconds[peer], seconds[again], accuracy)
    return sides


def _accuracy(outcomes):
    return statistics.median(outcome.accuracy for outcome in outcomes)


def contestants(dataset: Any, arm: str, config: Config) -> dict[str, Callable[[int], Outcome]]:
    """What a round calls with the turn it is: ours by seeds; peers that compile, and again."""
    flax, keras = jitted_flax(arm), compiled_keras(arm)
    makes = (
        (flax_run, lambda: jitted_flax(arm), lambda: flax),
        (keras_run, lambda: compiled_keras(arm), lambda: restarted(keras, arm)),
    )
    entered = {
        str(seeds): functools.partial(ours, dataset, arm, config.epochs, seeds)
        for seeds in config.seeds
    }
    for peer, (train, anew, kept) in zip(PEERS, makes, strict=True):
        entered[peer] = functools.partial(train, anew, dataset, config.epochs)
        entered[f"{peer} {AGAIN}"] = functools.partial(train, kept, dataset, config.epochs)
    return entered


def ours(dataset: Any, arm: str, epochs: int, seeds: int, turn: int) -> Outcome:
    """All runs of one arm, with the seeds that follow those of the turn before."""
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
    chosen = range(turn * seeds, (turn + 1) * seeds)
    records = [r for rs in sweep(run, dataset, points, chosen, budget) for r in rs]
    final = [r["test_accuracy"][-1] for r in records if r["learning_rate"] == 0.01]
    # Every record has that of the whole sweep, which compiles once.
    return Outcome(statistics.median(final), records[0]["seconds"]["compilation"])


class Jitted(NamedTuple):
    """Flax's network, its optimizer, and the functions that are compiled when first called."""

    net: nn.Module
    tx: optax.GradientTransformation
    step: Callable[..., Any]
    accuracy: Callable[..., jax.Array]


def jitted_flax(arm: str) -> Jitted:
    """A jitted step and an evaluation as Flax's own examples write them."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(50, kernel_init=nn.initializers.he_uniform())(x))
            if arm == "bn":
                x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(1)(x)[:, 0]

    net, tx = Net(), optax.sgd(0.01, momentum=0.9)

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

    return Jitted(net, tx, step, accuracy)


def flax_run(make: Callable[[], Jitted], dataset: Any, epochs: int, seed: int) -> Outcome:
    """One run as Flax's own examples write it: a jitted step, called from Python."""
    net, tx, step, accuracy = make()
    x, y = (np.asarray(v, np.float32) for v in dataset.train)
    # Operation by operation: 5 ms, for which jit would compile half a second.
    variables = net.init(jax.random.key(seed), x[:1], train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    opt_state = tx.init(params)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for i in range(0, len(x) - BATCH + 1, BATCH):
            rows = order[i : i + BATCH]
            params, stats, opt_state = step(params, stats, opt_state, x[rows], y[rows])
        for split in (dataset.validation, dataset.test):
            result = float(accuracy(params, stats, *split))
    return Outcome(result)


def keras_network(arm: str) -> Any:
    """A Keras model with its initial weights."""
    import keras
    from keras import layers

    norm = [layers.BatchNormalization()] if arm == "bn" else []
    hidden = layers.Dense(50, activation="relu", kernel_initializer="he_uniform")
    last = layers.Dense(1, activation="sigmoid")
    return keras.Sequential([keras.Input((2,)), hidden, *norm, last])


def compiled_keras(arm: str) -> Any:
    """`compile` in Keras' sense: XLA compiles when the model is first trained."""
    import keras

    net = keras_network(arm)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    net.compile(optimizer, loss="binary_crossentropy", metrics=["accuracy"])
    return net


def restarted(net: Any, arm: str) -> Any:
    """The same model with weights drawn anew and momenta 0; what was compiled stays."""
    for weight, drawn in zip(net.weights, keras_network(arm).weights, strict=True):
        weight.assign(drawn)
    net.optimizer.build(net.trainable_variables)  # unless it is
    for momentum in net.optimizer.momentums:
        momentum.assign(np.zeros(momentum.shape, momentum.dtype))
    return net


def keras_run(make: Callable[[], Any], dataset: Any, epochs: int, seed: int) -> Outcome:
    """One run of Keras 3 on its JAX backend, as its tutorials write it."""
    import keras

    keras.utils.set_random_seed(seed)
    net = make()
    (x, y), validation, test = (
        [np.asarray(v, np.float32) for v in split] for split in dataset[:3]
    )
    net.fit(x, y, validation_data=validation, epochs=epochs, batch_size=BATCH, verbose=0)
    return Outcome(net.evaluate(*test, verbose=0)[1])


if __name__ == "__main__":
    flags.main(Config, run)
