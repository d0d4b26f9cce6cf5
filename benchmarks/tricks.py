"""What each thing that we do for speed gains: the same work with it and without it.

Both are timed side by side, and `gain` is the median of the ratios within a round; beside it
stands what the gain should come from. What gains less than 10 % where it counts has no place in
the code. BN+ReLU as one function is there for
memory, and not for time: it keeps nothing but x, where ReLU by itself keeps its mask
(`benchmarks.layer`, column `kept`).

Tried, and not kept, as they did not pay (XLA on CPU):

- Both sums of a BatchNorm in one `lax.reduce` of two numbers, or packed into complex ones, so
  that x is read once: XLA vectorises neither, and each took several times what two sums take.
  As one sum over an axis of two more it took 1.7 times, over parts that fit a cache in a loop
  1.06 times and more.
- The mean first and then the squares of what is left: for a layer by itself one pass more over
  x than sums about a sampled shift. Under `vmap`, on batches of tens, it would be the faster of
  the two; one rule for all was kept.
- Leaving YNN out of programs with images: its sums over large arrays are several times as fast
  as XLA's own, so it is left out of vmapped programs of dense layers alone.
- Sums of float16 arrays without a float32 copy of them: XLA on CPU makes one all the same,
  which of bfloat16 it does not where each sum has its array under a name of its own.
- Both sums of the gradient in one pass, as eight slices of the array that are added up: with
  ReLU and in float32 a sixth of the layer's time, in bfloat16 and without ReLU slower, and the
  sums would have to be written out that JAX's transposition gives.
- The mask of ReLU as sign(max(y, 0)), which YNN, unlike a comparison, takes into its sums: the
  backward pass took twice as long as with the masked dy stored once.
- Compiling an engine's programs side by side in threads: a second of a sweep of thirty.
- Host devices, one for each core, in place of the threads of `--parallel=cores`: programs took
  longer to compile, and the steps of circles hardly less.
- The same for network A, with half of every batch on each: neither step nor epoch gained.
- Convolutions of 1x1 as products: from 1.5 times faster to 2.3 times slower, by shape.
- Kernel gradients over parts of the batch, or with x and dy in each other's place.
- The loss by a one-hot mask in place of a gather: 3 to 6 % of a step of the MNIST network.
- Cores with runs of their own for circles: the steps of an epoch are too few for the calls that
  each run then needs for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.machine import describe_machine
from benchmarks.peers import Task, ours
from benchmarks.peers.process import Process
from bn_jax import batch_norm, moments, normalize
from bn_jax.lab import arms, flags
from bn_jax.lab.data.batches import permutation
from bn_jax.lab.fields import flag
from bn_jax.lab.models import cifar, dense
from bn_jax.lab.models.pooling import max_pool
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import padded
from bn_jax.lab.sweeps import Budget, Point, engines
from bn_jax.lab.sweeps.timing import interleave, median_ratio
from bn_jax.xla import keep_memory, set_flags
from experiments import circles

CALLS = 100  # of what takes too little to be timed by itself
CNN = Task("cifar_a", (8, 16, 64, 32), (16, 16, 3), 128, 32)


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.tricks --help`."""

    shape: tuple[int, ...] = flag((256, 32, 32, 32), "of a layer's array, features last")
    small: int = flag(4, "examples of the small one, which is a part of it")
    runs: int = flag(100, "in a sweep of circles' network")
    epochs: int = flag(5, "of such a sweep that are timed")
    seeds: int = flag(10, "of a network for digits, three layers of 100 sigmoids")
    steps: int = flag(100, "of each of them that are timed")
    width: int = flag(4096, "of the layer of a network of one, in batches of 64")
    batch: int = flag(256, "of the step of network A")
    features: tuple[int, ...] = flag((32, 64, 128, 512, 128), "of network A")
    rounds: int = flag(9, "how often each is timed")


class Trick(NamedTuple):
    """Two calls that do the same, and why the first should take less."""

    what: str
    instead: str
    should: str
    on: Callable[[], Any]
    off: Callable[[], Any]


def run(config: Config) -> dict[str, float]:
    """Prints a table; the gains come back, by trick."""
    keep_memory()
    print(describe_machine() + "\n")
    rows, gains = [], {}
    kinds = (of_layers, of_sweeps, of_dense_networks, of_networks)
    for trick in itertools.chain.from_iterable(kind(config) for kind in kinds):
        seconds = interleave({"on": trick.on, "off": trick.off}, config.rounds)
        gains[trick.what] = median_ratio(seconds, "off", "on")
        times = (padded(1e3 * statistics.median(seconds[k])) for k in ("on", "off"))
        gain = f"{gains[trick.what]:.2f}"
        rows.append([trick.what, trick.instead, *times, gain, trick.should])
    print(table(["what", "in place of", "ms", "ms without", "gain", "should gain"], rows))
    return gains


def of_layers(config: Config) -> Iterator[Trick]:
    """A BatchNorm by itself."""
    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.random.normal(key, config.shape) for key in keys)
    one = jnp.ones(config.shape[-1])

    def both(f, x=x, dy=dy):
        def program(x, scale, bias, dy):
            y, vjp = jax.vjp(f, x, scale, bias)
            return y, vjp(dy)

        arguments = x, one, one, dy
        return functools.partial(jax.jit(program).lower(*arguments).compile(), *arguments)

    def plain(x, scale, bias):
        batch = moments(x)
        return normalize(x, batch.mean, batch.var, scale, bias)

    def closed(x, scale, bias, activation=None):
        return batch_norm(x, scale, bias, activation=activation, dtype=x.dtype)[0]

    def forward():
        return functools.partial(
            jax.jit(lambda *v: closed(*v)).lower(x, one, one).compile(), x, one, one
        )

    few = x[: config.small], dy[: config.small]
    with mock.patch("bn_jax.core.moments._raw_sums_first", return_value=()):
        shifted, shifted_few = forward(), both(closed, *few)
    yield Trick(
        "raw sums where means are near 0", "sums about a shift",
        "XLA sums what is stored in half the time of what it computes", forward(), shifted,
    )  # fmt: skip
    yield Trick(
        f"the same, {CALLS} forward and backward passes of {few[0].size:,} elements",
        "sums about a shift", "two passes of eight in half their time",
        *(functools.partial(several, call) for call in (both(closed, *few), shifted_few)),
    )  # fmt: skip
    yield Trick(
        "gradient in closed form", "autodiff's",
        "8 passes over the array, and none over what autodiff keeps", both(closed), both(plain),
    )  # fmt: skip
    half = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    with contextlib.ExitStack() as patched:
        for module in ("arrays", "moments", "batch_norm"):
            name = f"bn_jax.core.{module}.is_stored_wide"
            patched.enter_context(mock.patch(name, return_value=False))
        copied = both(closed, *half)
    own = both(closed, *half)
    yield Trick(
        "bfloat16 under a name for each sum", "under one name",
        "half: no float32 copies, which have twice the bytes", own, copied,
    )  # fmt: skip
    yield Trick(
        "BN+ReLU as one function", "one after the other", "no time, but memory",
        both(functools.partial(closed, activation=nn.relu)),
        both(lambda *v: nn.relu(closed(*v))),
    )  # fmt: skip


def several(call: Callable[[], Any]) -> list[Any]:
    """What some calls of a tenth of a millisecond give: one would be timed with its start."""
    return [call() for _ in range(CALLS)]


def of_sweeps(config: Config) -> Iterator[Trick]:
    """Many runs of circles' network."""
    settings = circles.Config(steps=config.epochs * circles.STEPS_PER_EPOCH)
    dataset = arms.load_data(settings)
    run = arms.build_run(settings, circles.arms()["bn"], dataset)
    budget = Budget(settings.steps, settings.eval_every)
    point = Point(settings.learning_rates[0], 1.0, settings.momentums[0])
    keys = jax.random.split(jax.random.key(0), config.runs)

    def shuffle(f):
        examples = dataset.train.labels.size
        return functools.partial(jax.jit(jax.vmap(lambda key: f(key, examples))), keys)

    yield Trick(
        "shuffling by single 64-bit numbers", "jax.random.permutation",
        "half or less: one array to sort, and XLA's fast way to do so",
        shuffle(permutation), shuffle(jax.random.permutation),
    )  # fmt: skip

    def trained(runs):
        return ours.epochs(run, dataset, point, budget, runs, engines.VmappedSweep)

    with mock.patch.object(engines, "without_library", dict):
        library = trained(config.runs)
    yield Trick(
        "sweeps without the YNN library", "with it",
        "its sums take several times as long over vmapped batches",
        trained(config.runs), library,
    )  # fmt: skip
    with mock.patch.object(dense, "FEW", 0):
        products = trained(config.runs)
    yield Trick(
        "few inputs row by row", "lax.dot_general",
        "2 inputs are two products and a sum, which fuse with what follows",
        trained(config.runs), products,
    )  # fmt: skip
    alone = trained(1)
    yield Trick(
        f"{config.runs} runs in one program", "one after another",
        "what starting an operation takes, for all runs but one",
        trained(config.runs), lambda: [alone() for _ in range(config.runs)],
    )  # fmt: skip


def of_dense_networks(config: Config) -> Iterator[Trick]:
    """Runs of the networks of `benchmarks.peers`, without convolutions."""
    wide = Task("mlp", (config.width,), (8, 8, 1), 64 * config.steps, 64)
    with mock.patch.object(engines, "_of_one", engines._over_grid):
        vmapped = ours.trainer(wide)
    yield Trick(
        "a single run as it is", "under vmap over axes of 1",
        "one of the two branches of a large layer's statistics: vmap computes both",
        ours.trainer(wide), vmapped,
    )  # fmt: skip
    small = Task("mlp", (100, 100, 100), (8, 8, 1), 60 * config.steps, 60)
    yield Trick(
        f"{config.seeds} runs on cores of their own", "in one program",
        "up to the number of cores, as operations are too small to be shared out",
        *(ours.trainer(small, config.seeds, parallel=p) for p in ("cores", "single")),
    )  # fmt: skip


def of_networks(config: Config) -> Iterator[Trick]:
    """Convolutions."""
    x = jax.random.normal(jax.random.key(0), config.shape)

    def pooled(f):
        return functools.partial(jax.jit(jax.grad(lambda x: f(x).sum())), x)

    yield Trick(
        "max-pool in slices", "flax.linen.max_pool",
        "maxima of whole arrays, of which the gradient is a comparison and no scatter",
        pooled(lambda x: max_pool(x, 2, 2, "VALID")),
        pooled(lambda x: nn.max_pool(x, (2, 2), (2, 2))),
    )  # fmt: skip
    yield Trick(
        "convolutional steps from Python", "in a scan",
        "XLA takes convolutions in a loop to one core, and to a plain loop nest",
        ours.trainer(CNN, make=engines.StepwiseSweep),
        ours.trainer(CNN, make=engines.VmappedSweep),
    )  # fmt: skip
    n = config.batch
    task = Task("cifar_a", config.features, (32, 32, 3), n, n)
    names = {
        ("XLA's own convolutions", "those of YNN", "half of the step"): (keep_memory,),
        (
            "swapping axes for kernel gradients apart", "together with what came before",
            "BatchNorm and ReLU computed once more in a swapped order: a fifth of the step",
        ): (*ours.START, _flax_convolutions),
        ("large blocks of memory kept", "mapped anew", "the kernel clears pages: a sixth"): (
            set_flags,
        ),
    }  # fmt: skip
    own = Process(ours.prepare, task, 1, ours.START)
    for name, start in names.items():
        other = Process(ours.prepare, task, 1, start)
        yield Trick(*name, *(functools.partial(side.call, "step") for side in (own, other)))
        other.close()
    own.close()


def _flax_convolutions():
    mock.patch.object(cifar, "Conv", nn.Conv).start()


if __name__ == "__main__":
    flags.main(Config, run)
