"""Networks whose normalisation is a constructor argument, one family per file."""

from bn_jax.lab.models.airbench import Airbench
from bn_jax.lab.models.cifar import CifarA, CifarB
from bn_jax.lab.models.cnn import CNN
from bn_jax.lab.models.inception import Inception
from bn_jax.lab.models.lstm import LSTM, LSTM_PLACES
from bn_jax.lab.models.mlp import MLP
from bn_jax.lab.models.norms import ACTIVATIONS, NORMS, PLACES, GroupNorm, Norm
from bn_jax.lab.models.resnet import ResNet, ResNet18, ResNet50

# By the name of a flag.
FAMILIES = {
    "mlp": MLP,
    "cnn": CNN,
    "cifar_a": CifarA,
    "cifar_b": CifarB,
    "airbench": Airbench,
    "lstm": LSTM,
    "inception": Inception,
    "resnet18": ResNet18,
    "resnet50": ResNet50,
}
# Where the norm may go in families that have other places than `PLACES`.
OWN_PLACES = {"lstm": LSTM_PLACES}

__all__ = [
    "ACTIVATIONS",
    "CNN",
    "FAMILIES",
    "LSTM",
    "MLP",
    "NORMS",
    "OWN_PLACES",
    "PLACES",
    "Airbench",
    "CifarA",
    "CifarB",
    "GroupNorm",
    "Inception",
    "Norm",
    "ResNet",
    "ResNet18",
    "ResNet50",
]
