"""Gives the BatchNorms of a checkpointed model the population statistics of some inputs.

Leaves the variables as a checkpoint of the same structure.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bn_jax.errors import UserError
from experiments import checkpoint, flags
from experiments.flags import flag


@dataclasses.dataclass(frozen=True)
class Config(checkpoint.WritingConfig):
    """Every flag of the tool; see `python -m experiments.recalibrate --help`."""

    batch_size: int = flag(500, "inputs that are normalised together")
    layer_by_layer: bool = flag(
        False, "each layer as it will be used, after recalibrated ones; a pass for each"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"--batch_size={self.batch_size}: it must be at least 1")


def run(config: Config) -> Any:
    """Recalibrates; the variables come back."""
    from flax.errors import FlaxError

    from bn_jax.surgery import recalibrate

    model, variables, inputs = checkpoint.load(config)
    size = config.batch_size
    batches = [inputs[i : i + size] for i in range(0, len(inputs), size)]
    call = checkpoint.keywords("train", config.train)
    try:
        variables = recalibrate(
            model, variables, batches, layer_by_layer=config.layer_by_layer, **call
        )
    except (FlaxError, TypeError, ValueError) as e:
        raise UserError(str(e)) from e
    checkpoint.save(config.out, variables)
    print(config.out)
    return variables


if __name__ == "__main__":
    flags.main(Config, run)
