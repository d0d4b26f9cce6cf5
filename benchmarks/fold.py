"""What prediction costs with BatchNorm, with it folded, and without any.

For the networks of `bn_jax.lab.models`: one compiled program each, interleaved in one process;
medians over the rounds, of times and of ratios within a round. `/without` is the time over
that of the network that was built without BatchNorm.
"""

from __future__ import annotations

import dataclasses

import jax

from benchmarks.memory import one_heap
from benchmarks.where import describe_machine
from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.models import CNN, MLP
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import padded
from bn_jax.linen import BatchNorm
from experiments.first_layer import Prediction, predict_folded

MODELS = {
    "cnn": (CNN((32, 64, 128), 10, norm=BatchNorm), (32, 32, 3)),
    "mlp": (MLP((512, 512, 512), 10, norm=BatchNorm), (784,)),
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


def run(config: Config) -> dict[str, list[Prediction]]:
    """Prints a table; the predictions come back, by model."""
    one_heap()
    print(describe_machine() + "\n")
    rounds = QUICK if config.quick else config.rounds
    found = {
        name: [measure(name, size, rounds) for size in config.batch_sizes] for name in MODELS
    }
    header = ["model", "batch", "network", "ms", "/without", "largest difference"]
    lines = [line for name, some in found.items() for p in some for line in rows(name, p)]
    print(table(header, lines))
    return found


def measure(name: str, size: int, rounds: int) -> Prediction:
    """Of one model, at one batch size."""
    model, shape = MODELS[name]
    x = jax.random.normal(jax.random.key(0), (size, *shape))
    variables = model.init(jax.random.key(1), x, train=False)
    return predict_folded(model, variables, x, rounds)


def rows(name: str, p: Prediction) -> list[list[str]]:
    """A line for each network."""
    found = (
        ("with BatchNorm", p.unfolded_milliseconds, p.unfolded_to_without, ""),
        ("folded", p.milliseconds, p.to_without, f"{p.difference:.1e}"),
        ("without", p.without_milliseconds, 1, ""),
    )
    return [
        [name, str(p.batch), network, padded(ms), f"{ratio:.2f}", difference]
        for network, ms, ratio, difference in found
    ]


if __name__ == "__main__":
    flags.main(Config, run)
