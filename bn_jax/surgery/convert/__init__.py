"""BatchNorm layers and networks of other frameworks, from there to here and back.

    layer_from_torch(layer)      -> (fields of our BatchNorm, its variables)
    layer_to_torch(layer, variables) -> (keyword arguments there, its values)
    from_torch(foreign, model, variables, *inputs) -> variables
    to_torch(foreign, model, variables, *inputs)   -> what the foreign model loads

and alike for each framework. Of both models in `from_` and `to_` one is the template, the
other has the values; `from_torch` says how layers are paired.
"""

from bn_jax.surgery.convert.equinox import layer_from_equinox, layer_to_equinox
from bn_jax.surgery.convert.flax import from_flax, layer_from_flax, layer_to_flax, to_flax
from bn_jax.surgery.convert.haiku import layer_from_haiku, layer_to_haiku
from bn_jax.surgery.convert.keras import from_keras, layer_from_keras, layer_to_keras, to_keras
from bn_jax.surgery.convert.torch import from_torch, layer_from_torch, layer_to_torch, to_torch

__all__ = [
    "from_flax",
    "from_keras",
    "from_torch",
    "layer_from_equinox",
    "layer_from_flax",
    "layer_from_haiku",
    "layer_from_keras",
    "layer_from_torch",
    "layer_to_equinox",
    "layer_to_flax",
    "layer_to_haiku",
    "layer_to_keras",
    "layer_to_torch",
    "to_flax",
    "to_keras",
    "to_torch",
]
