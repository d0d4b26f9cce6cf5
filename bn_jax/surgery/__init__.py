"""Operations on whole models with BatchNorm layers, Linen's and NNX's, ours and Flax's.

A model is a `flax.linen.Module` with its variables, or an `nnx.GraphDef` with its `nnx.State`;
every operation is a function from variables to variables.
"""

from bn_jax.surgery.fold import fold
from bn_jax.surgery.recalibrate import recalibrate, reset

__all__ = ["fold", "recalibrate", "reset"]
