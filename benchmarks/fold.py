"""What prediction costs with BatchNorm, with it folded, and without any.

For the networks of `bn_jax.models`: one compiled program each, interleaved in one process;
medians over the rounds, of times and of ratios within a round. `/without` is the time over
that of the network that was built without BatchNorm.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.memory import one_heap
from bn_jax.errors import UserError
from bn_jax.linen import BatchNorm
from bn_jax.measure.timing import interleave, median_ratio
from bn_jax.models import CNN, MLP
from bn_jax.report.text import padded
from bn_jax.surgery import fold
from experiments import flags
from experiments.flags import flag

MODELS = {
    "cnn": (functools.partial(CNN, (32, 64, 128), 10), (32, 32, 3)),
    "mlp": (functools.partial(MLP, (512, 512, 512), 10), (784,)),
}
QUICK = 10  # rounds


@dataclasses.dataclass(frozen=True)
class Config:
    """Every flag of the benchmark; see `python -m benchmarks.fold --help`."""

    batch_sizes: tuple[int, ...] = flag((1, 256), "examples in a prediction")
    rounds: int = flag(100, "how often everything is timed")
    quick: bool = flag(False, f"{QUICK} rounds")

    def __post_init__(self):
        if not self.batch_sizes or min(self.batch_sizes) < 1 or self.rounds < 1:
            raise UserError("--batch_sizes and --rounds: at least 1")


def run(config: Config) -> list[dict[str, Any]]:
    """Prints the table; its rows come back, with seconds and ratios."""
    one_heap()
    rows = [
        row
        for name in MODELS
        for size in config.batch_sizes
        for row in measure(name, size, QUICK if config.quick else config.rounds)
    ]
    Console(highlight=False).print(table(rows))
    return rows


def measure(name: str, size: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one model at one batch size."""
    build, shape = MODELS[name]
    x = jax.random.normal(jax.random.key(0), (size, *shape))
    with_bn, without = build(norm=BatchNorm), build(norm=None)
    variables = with_bn.init(jax.random.key(1), x, train=False)
    folded = fold(with_bn, variables, x, train=False)
    plain = without.init(jax.random.key(1), x, train=False)
    contestants = {
        "with BatchNorm": _predict(with_bn, variables, x),
        "folded": _predict(folded.model, folded.variables, x),
        "without": _predict(without, plain, x),
    }
    seconds = interleave(contestants, rounds)
    return [
        {
            "model": name, "batch_size": size, "network": network,
            "seconds": statistics.median(seconds[network]),
            "to_without": median_ratio(seconds, network, "without"),
            "difference": folded.difference if network == "folded" else None,
        }
        for network in contestants
    ]  # fmt: skip


def _predict(model, variables, x):
    predict = jax.jit(functools.partial(model.apply, train=False))
    return functools.partial(predict, variables, x)


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each model, batch size and network."""
    result = Table(box=None)
    names = ("model", "batch", "network", "ms", "/without", "largest difference")
    for i, name in enumerate(names):
        result.add_column(name, justify="left" if i in (0, 2) else "right")
    for row in rows:
        first = row["network"] == "with BatchNorm"
        result.add_row(
            row["model"] if first else "",
            str(row["batch_size"]) if first else "",
            row["network"],
            padded(1e3 * row["seconds"]),
            f"{row['to_without']:.2f}",
            "" if row["difference"] is None else f"{row['difference']:.1e}",
        )
    return result


if __name__ == "__main__":
    flags.main(Config, run)
