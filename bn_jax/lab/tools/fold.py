"""Folds the BatchNorms of a checkpointed model into the layers next to them.

Prints what was folded into what and what was not and why, and the largest difference of the
outputs. Leaves the variables of the folded model, which `bn_jax.surgery.fold` returns, as a
checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.tools import checkpoint


@dataclasses.dataclass(frozen=True)
class Config(checkpoint.WritingConfig):
    """Every flag of the tool; see `python -m bn_jax.lab.tools.fold --help`."""

    exclude: tuple[str, ...] = flag((), "BatchNorms that stay: paths, or globs of such")


def run(config: Config) -> Any:
    """Folds; what `bn_jax.surgery.fold` returns comes back."""
    from flax.errors import FlaxError

    from bn_jax.errors import UserError
    from bn_jax.surgery import fold
    from bn_jax.surgery.calls import spelled

    model, variables, inputs = checkpoint.load(config)
    call = checkpoint.keywords("evaluate", config.evaluate)
    try:
        folded = fold(model, variables, inputs, exclude=config.exclude, **call)
    except (FlaxError, TypeError, ValueError) as e:
        raise UserError(str(e)) from e
    for norm, layer, side in folded.pairs:
        print(f"{spelled(norm)} into {spelled(layer)}, which is {side} it")
    for norm, reason in folded.refused.items():
        print(f"{spelled(norm)} stays: {reason}")
    print(f"largest difference of the outputs: {folded.difference:.2g} of their size")
    checkpoint.save(config.out, folded.variables)
    print(config.out)
    return folded


if __name__ == "__main__":
    flags.main(Config, run)
