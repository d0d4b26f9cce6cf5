"""Networks whose normalisation is a constructor argument, one family per file."""

from bn_jax.models.cifar import CifarA, CifarB
from bn_jax.models.cnn import CNN
from bn_jax.models.mlp import MLP
from bn_jax.models.norms import ACTIVATIONS, NORMS, PLACES, GroupNorm, Norm

# By the name of a flag.
FAMILIES = {"mlp": MLP, "cnn": CNN, "cifar_a": CifarA, "cifar_b": CifarB}

__all__ = [
    "ACTIVATIONS",
    "CNN",
    "FAMILIES",
    "MLP",
    "NORMS",
    "PLACES",
    "CifarA",
    "CifarB",
    "GroupNorm",
    "Norm",
]
