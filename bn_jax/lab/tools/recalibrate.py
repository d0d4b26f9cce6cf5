"""Gives the BatchNorms of a checkpointed model the population statistics of some inputs.

Leaves the variables as a checkpoint of the same structure.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.tools import checkpoint


@dataclasses.dataclass(frozen=True)
class Config(checkpoint.WritingConfig):
    """Every flag of the tool; see `python -m bn_jax.lab.tools.recalibrate --help`."""

    batch_size: int = flag(500, "inputs that are normalised together", at_least=1)
    layer_by_layer: bool = flag(
        False, "each layer as it will be used, after recalibrated ones; a pass for each"
    )
    only: str = flag("*", "the layers, by a glob over paths such as encoder/*")
    skip_nonfinite: bool = flag(False, "leave out batches whose moments are not finite")
    rngs: str = flag("", "seeds of a Linen model's random numbers, such as dropout=0")

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        seeds = checkpoint.keywords("rngs", self.rngs).values()
        if not all(isinstance(seed, int) for seed in seeds):
            raise UserError(f"--rngs={self.rngs}: write seeds, as in dropout=0")


def run(config: Config) -> Any:
    """Recalibrates; the variables come back."""
    import jax
    from flax import nnx
    from flax.errors import FlaxError

    from bn_jax.surgery import recalibrate

    model, variables, inputs = checkpoint.load(config)
    size = config.batch_size
    batches = [inputs[i : i + size] for i in range(0, len(inputs), size)]
    call = checkpoint.keywords("train", config.train)
    if seeds := checkpoint.keywords("rngs", config.rngs):
        if isinstance(model, nnx.GraphDef):
            raise UserError(f"--rngs={config.rngs}: an NNX model has streams of its own")
        call["rngs"] = {name: jax.random.key(seed) for name, seed in seeds.items()}
    try:
        variables = recalibrate(
            model, variables, batches, layer_by_layer=config.layer_by_layer,
            only=config.only, skip_nonfinite=config.skip_nonfinite, **call,
        )  # fmt: skip
    except (FlaxError, TypeError, ValueError) as e:
        raise UserError(str(e)) from e
    checkpoint.save(config.out, variables)
    print(config.out)
    return variables


if __name__ == "__main__":
    flags.main(Config, run)
