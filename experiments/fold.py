"""Folds the BatchNorms of a checkpointed model into the layers next to them.

Prints what was folded into what and what was not and why, and the largest difference of the
outputs. Leaves the variables of the folded model, which `bn_jax.surgery.fold` returns, as a
checkpoint.
"""

from __future__ import annotations

from typing import Any

from experiments import checkpoint, flags


def run(config: checkpoint.WritingConfig) -> Any:
    """Folds; what `bn_jax.surgery.fold` returns comes back."""
    from flax.errors import FlaxError

    from bn_jax.errors import UserError
    from bn_jax.surgery import fold
    from bn_jax.surgery.intercept import spelled

    model, variables, inputs = checkpoint.load(config)
    call = checkpoint.keywords("evaluate", config.evaluate)
    try:
        folded = fold(model, variables, inputs, **call)
    except (FlaxError, TypeError, ValueError) as e:
        raise UserError(str(e)) from e
    for norm, layer, side in folded.pairs:
        print(f"{spelled(norm)} into {spelled(layer)}, which is {side} it")
    for norm, reason in folded.refused.items():
        print(f"{spelled(norm)} stays: {reason}")
    print(f"largest difference of the outputs: {folded.difference:.2g} of the largest output")
    checkpoint.save(config.out, folded.variables)
    print(config.out)
    return folded


if __name__ == "__main__":
    flags.main(checkpoint.WritingConfig, run)
