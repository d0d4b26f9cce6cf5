"""Operations on whole models with BatchNorm layers, Linen's and NNX's, ours and Flax's.

A model is a `flax.linen.Module` with its variables, or an `nnx.GraphDef` with its `nnx.State`;
an operation is a function of it that changes nothing in place.
"""

from bn_jax.surgery import convert
from bn_jax.surgery.accumulate import accumulate, accumulate_exactly
from bn_jax.surgery.calls import Adapter
from bn_jax.surgery.diagnose import Finding, diagnose, findings_to_json
from bn_jax.surgery.fold import fold
from bn_jax.surgery.freeze import decay_mask, freeze, frozen_mask
from bn_jax.surgery.recalibrate import recalibrate, reset
from bn_jax.surgery.swap import swap

__all__ = [
    "Adapter",
    "Finding",
    "accumulate",
    "accumulate_exactly",
    "convert",
    "decay_mask",
    "diagnose",
    "findings_to_json",
    "fold",
    "freeze",
    "frozen_mask",
    "recalibrate",
    "reset",
    "swap",
]
