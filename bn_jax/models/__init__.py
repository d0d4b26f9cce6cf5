"""Networks whose normalisation is a constructor argument, one family per file."""

from bn_jax.models.cnn import CNN
from bn_jax.models.mlp import MLP
from bn_jax.models.norms import ACTIVATIONS, NORMS, PLACES, GroupNorm, Norm

__all__ = ["ACTIVATIONS", "CNN", "MLP", "NORMS", "PLACES", "GroupNorm", "Norm"]
