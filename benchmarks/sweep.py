"""Circles: 600 runs from the start of the process to its report, and runs/s beside plain Flax.

`python -m experiments.circles` is timed whole: 6 arms x 100 seeds x 100 epochs, imports,
compilation, figures and the page included; at every start first with no compiled programs kept,
then with those that this one left. Medians over the starts.

Below, one arm at a time: 5 learning rates with 100 seeds as one vmapped program, beside a
jitted Flax step in a Python loop, which trains one run at a time, at rate .01. Both take turns
in one process, in an order drawn anew in every round; what counts is the median over the rounds
of the ratios of runs per second. `whole`: a script that is started once for each run compiles
every time, bn_jax once for all. `compiled`: nobody compiles.

The network is Dense 50 ReLU, with BatchNorm or without, Dense 1 sigmoid; SGD .01 with momentum
.9, batches of 32 of 400 examples; both evaluate validation and test examples after every epoch.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.machine import describe_machine
from benchmarks.start import timed
from bn_jax.lab import flags
from bn_jax.lab.data import batch_indices, load
from bn_jax.lab.data.dataset import Dataset
from bn_jax.lab.fields import flag
from bn_jax.lab.models import MLP
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import padded
from bn_jax.lab.sweeps import Budget, Point, sweep
from bn_jax.lab.sweeps.timing import interleave
from bn_jax.lab.training.run import Run
from bn_jax.linen import BatchNorm

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
BATCH = 32
OURS, FLAX, AGAIN = "bn_jax", "plain Flax", "plain Flax, compiled"


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.sweep --help`."""

    seeds: int = flag(100, "seeds of a sweep, and of each arm of the whole command")
    epochs: int = flag(100, "epochs of a run")
    starts: int = flag(3, "times that the whole command is timed; 0: not at all")
    rounds: int = flag(7, "rounds, in each of which every side is timed once")


def run(config: Config) -> dict[str, float]:
    """Prints two tables; seconds of the whole command and ratios to Flax come back."""
    print(describe_machine("flax") + "\n")
    found = whole(config) if config.starts else {}
    dataset, rows = load("circles", validation_fraction=0.2, scaling="raw"), []
    for arm in ("none", "bn"):
        ratios, lines = beside_flax(dataset, arm, config)
        rows += lines
        found |= {f"{arm}, {way}": ratio for way, ratio in ratios.items()}
    header = ["arm, side", "runs", "seconds", "runs/s", "test accuracy", "over Flax: whole",
              "compiled"]  # fmt: skip
    print(table(header, rows))
    return found


def whole(config: Config) -> dict[str, float]:
    """Seconds of the experiment, by whether compiled programs were kept."""
    seconds: dict[str, list[float]] = {"none kept": [], "kept": []}
    steps = config.epochs * (500 // BATCH)
    for _ in range(config.starts):
        with tempfile.TemporaryDirectory() as folder:
            for name, times in seconds.items():
                times.append(timed((
                    "-m", "experiments.circles", f"--seeds={config.seeds}", f"--steps={steps}",
                    f"--cache_dir={Path(folder, 'cache')}", f"--workdir={Path(folder, name)}",
                )))  # fmt: skip
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [[name, padded(s), padded(6 * config.seeds / s)] for name, s in medians.items()]
    print(table(["compiled programs", "seconds", "runs/s"], rows))
    return medians


def beside_flax(
    dataset: Dataset, arm: str, config: Config
) -> tuple[dict[str, float], list[list[str]]]:
    """One arm's runs/s over Flax's, with compilation on both sides and on none; its rows."""
    outcomes: dict[str, list[tuple[float, float]]] = {OURS: [], FLAX: [], AGAIN: []}
    kept = flax_runs(arm, dataset, config.epochs)

    def call(name):
        turn = len(outcomes[name])
        if name == OURS:
            outcomes[name].append(ours(dataset, arm, config, turn))
        else:
            one = kept if name == AGAIN else flax_runs(arm, dataset, config.epochs)
            outcomes[name].append((one(turn), 0.0))

    calls = {name: functools.partial(call, name) for name in outcomes}
    seconds = interleave(calls, config.rounds)
    runs = len(RATES) * config.seeds
    compilation = [c for _, c in outcomes[OURS][-config.rounds :]]
    turns = zip(seconds[OURS], compilation, seconds[FLAX], seconds[AGAIN], strict=True)
    found = [(flax / mine, again / (mine - c)) for mine, c, flax, again in turns]
    ratios = {
        way: statistics.median(runs * pair[i] for pair in found)
        for i, way in enumerate(("whole", "compiled"))
    }
    rows = []
    for name, times in seconds.items():
        accuracy = statistics.median(a for a, _ in outcomes[name])
        count, over = (runs, map(padded, ratios.values())) if name == OURS else (1, ("", ""))
        median = statistics.median(times)
        rows.append([f"{arm}, {name}", f"{count:,}", padded(median), padded(count / median),
                     f"{accuracy:.3f}", *over])  # fmt: skip
    return ratios, rows


def ours(dataset: Dataset, arm: str, config: Config, turn: int) -> tuple[float, float]:
    """The median test accuracy of all runs at rate .01, and seconds of compilation.

    The seeds follow those of the turn before.
    """
    per_epoch = dataset.train.labels.size // BATCH

    def model(swept):
        norm = functools.partial(BatchNorm, momentum=swept.momentum)
        return MLP((50,), 1, norm=norm if arm == "bn" else None, places=("after",))

    def batches(key, first_step, num_steps):
        return batch_indices(key, first_step, num_steps, dataset.train.labels.size, BATCH)

    run = Run(model, functools.partial(optax.sgd, momentum=0.9), dataset.scaled, batches)
    points = [Point(rate, 1.0, 0.99) for rate in RATES]
    budget = Budget(steps=config.epochs * per_epoch, eval_every=per_epoch)
    chosen = range(turn * config.seeds, (turn + 1) * config.seeds)
    records = [r for rs in sweep(run, dataset, points, chosen, budget) for r in rs]
    final = [r.final() for r in records if r.learning_rate == 0.01]
    # Every record has that of the whole sweep, which compiles once.
    return statistics.median(final), records[0].seconds.compilation


def flax_runs(arm: str, dataset: Dataset, epochs: int) -> Callable[[int], float]:
    """Test accuracy by seed, of a jitted step called from Python, as Flax's examples are.

    The step is compiled at the first run.
    """

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

    def trained(seed):
        x, y = (np.asarray(v, np.float32) for v in dataset.train)
        # Operation by operation: 5 ms, for which jit would compile half a second.
        variables = net.init(jax.random.key(seed), x[:1], train=False)
        params, stats = variables["params"], variables.get("batch_stats", {})
        opt_state, rng, result = tx.init(params), np.random.default_rng(seed), 0.0
        for _ in range(epochs):
            order = rng.permutation(len(x))
            for i in range(0, len(x) - BATCH + 1, BATCH):
                rows = order[i : i + BATCH]
                params, stats, opt_state = step(params, stats, opt_state, x[rows], y[rows])
            for split in (dataset.validation, dataset.test):
                result = float(accuracy(params, stats, *split))
        return result

    return trained


if __name__ == "__main__":
    flags.main(Config, run)
