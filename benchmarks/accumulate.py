"""Time and memory of a step's gradient: the big batch, and two ways to accumulate it.

`accumulate` normalises micro-batches by their own statistics, `accumulate_exactly` by those
of the whole batch; `python -m benchmarks.accumulate` runs both beside the big batch on the
MLP and the CNN of `bn_jax.lab.models`, on random images, 4 and 16 micro-batches to a batch.

All run in one process, each once in every round; what counts is the median over the rounds,
of times and of ratios within a round. `parts` are micro-batches; `MB` is temporary memory of
the compiled program; `difference` is the largest of the gradients from the big batch's, over
the largest of these. (On CPU XLA is many times slower at a convolution within a loop, and
the micro-batches are a loop.)
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe_machine, one_heap
from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.models import CNN, MLP
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import number, padded
from bn_jax.lab.sweeps.timing import interleave, median_ratio
from bn_jax.lab.training.metrics import cross_entropy
from bn_jax.linen import BatchNorm
from bn_jax.surgery.accumulate import accumulate, accumulate_exactly

CLASSES, BIG = 10, ("big batch", 1)
# A ReLU's derivative is another one where rounding changes the sign of its argument.
FIELDS = {"norm": BatchNorm, "activation": "gelu"}
MODELS: dict[str, nn.Module] = {
    "mlp": MLP((512,) * 6, CLASSES, **FIELDS),
    "cnn": CNN((32, 64, 64), CLASSES, **FIELDS),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.accumulate --help`."""

    models: tuple[str, ...] = flag(tuple(MODELS), f"of {', '.join(MODELS)}")
    batch: int = flag(256, "examples in a step")
    size: int = flag(32, "height and width of the images")
    micro_batches: tuple[int, ...] = flag((4, 16), "to a step; they divide the batch")
    rounds: int = flag(5, "how often everything is timed")

    def __post_init__(self):
        for name in self.models:
            if name not in MODELS:
                raise UserError(f"--models: {name!r} is none of {', '.join(MODELS)}")


class Contestant(NamedTuple):
    """`call()` gives (value, gradients, variables); seconds to compile, bytes in use."""

    call: Callable[[], Any]
    compiling: float
    temporary: int


def run(config: Config) -> dict[str, list[float]]:
    """Prints a table for each model; the differences of its rows come back."""
    one_heap()
    print(describe_machine() + "\n")
    return {name: measure(name, config) for name in config.models}


def measure(name: str, config: Config) -> list[float]:
    """Prints a row for the big batch and for each form and number of micro-batches."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(config.batch, config.size, config.size, 3)), jnp.float32)
    batch = x, jnp.asarray(rng.integers(0, CLASSES, config.batch))
    variables = MODELS[name].init(jax.random.key(0), x[:1], train=False)
    prepared = functools.partial(prepare, MODELS[name], variables)
    entered = {BIG: prepared(on_one_batch, batch)}
    for count in config.micro_batches:
        parts = jax.tree.map(lambda v, n=count: v.reshape(n, -1, *v.shape[1:]), batch)
        for form in (accumulate, accumulate_exactly):
            step = functools.partial(form, train=True)
            entered[form.__name__, count] = prepared(step, parts)
    seconds = interleave({key: c.call for key, c in entered.items()}, config.rounds)
    wanted, rows, differences = entered[BIG].call()[1], [], []
    for key, c in entered.items():
        differences.append(difference(c.call()[1], wanted))
        rows.append([
            key[0], str(key[1]), padded(1e3 * statistics.median(seconds[key])),
            f"{median_ratio(seconds, key, BIG):.2f}", padded(c.temporary / 1e6),
            f"{c.temporary / entered[BIG].temporary:.2f}", padded(c.compiling),
            number(differences[-1]),
        ])  # fmt: skip
    print(table([name, "parts", "ms", "/big", "MB", "/big", "compile (s)", "difference"], rows))
    return differences


def prepare(model: nn.Module, variables: Any, step: Callable[..., Any], batch: Any):
    """The step, compiled for the batch."""

    def loss(outputs, labels):
        return cross_entropy(outputs, labels).mean()

    program = jax.jit(lambda variables, batch: step(model, variables, loss, batch))
    start = time.perf_counter()
    compiled = program.lower(variables, batch).compile()
    return Contestant(
        functools.partial(compiled, variables, batch),
        time.perf_counter() - start,
        compiled.memory_analysis().temp_size_in_bytes,
    )


def on_one_batch(model: nn.Module, variables: Any, loss: Callable[..., Any], batch: Any):
    """What `accumulate` gives, of one batch as everyone trains on it."""
    inputs, targets = batch

    def value(params):
        own = {**variables, "params": params}
        outputs, new = model.apply(own, inputs, train=True, mutable=["batch_stats"])
        return loss(outputs, targets), {**variables, **new}

    of = jax.value_and_grad(value, has_aux=True)
    (value, variables), gradients = of(variables["params"])
    return value, gradients, variables


def difference(got: Any, wanted: Any) -> float:
    """The largest between two trees, over the largest of the second."""
    apart = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), got, wanted)
    largest = jax.tree.map(lambda b: jnp.max(jnp.abs(b)), wanted)
    return float(max(jax.tree.leaves(apart)) / max(jax.tree.leaves(largest)))


if __name__ == "__main__":
    flags.main(Config, run)
