"""What prediction costs with BatchNorm, with it folded, and without any.

For the networks of `bn_jax.lab.models`: one compiled program each, interleaved in one process;
medians over the rounds, of times and of ratios within a round. `/without` is the time over
that of the network that was built without BatchNorm.
"""

from __future__ import annotations

import dataclasses

import jax

from benchmarks.machine import describe_machine, one_heap
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.models import CNN, MLP
from bn_jax.lab.report.markdown import table
from bn_jax.lab.report.text import padded
from bn_jax.linen import BatchNorm
from experiments.first_layer import predict_folded

MODELS = {
    "cnn": (CNN((32, 64, 128), 10, norm=BatchNorm), (32, 32, 3)),
    "mlp": (MLP((512, 512, 512), 10, norm=BatchNorm), (784,)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.fold --help`."""

    batch_sizes: tuple[int, ...] = flag((1, 256), "examples in a prediction")
    rounds: int = flag(100, "how often everything is timed")


def run(config: Config) -> list[list[str]]:
    """Prints a table; its rows come back."""
    one_heap()
    print(describe_machine() + "\n")
    rows = []
    for name, (model, shape) in MODELS.items():
        for size in config.batch_sizes:
            x = jax.random.normal(jax.random.key(0), (size, *shape))
            variables = model.init(jax.random.key(1), x, train=False)
            p = predict_folded(model, variables, x, config.rounds)
            found = (
                ("with BatchNorm", p.unfolded_milliseconds, p.unfolded_to_without, ""),
                ("folded", p.milliseconds, p.to_without, f"{p.difference:.1e}"),
                ("without", p.without_milliseconds, 1, ""),
            )
            for network, ms, ratio, difference in found:
                rows.append([name, str(size), network, padded(ms), f"{ratio:.2f}", difference])
    print(table(["model", "batch", "network", "ms", "/without", "largest difference"], rows))
    return rows


if __name__ == "__main__":
    flags.main(Config, run)
