"""Flax: between Linen and NNX, and between Flax's layers and ours."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from flax import nnx

from bn_jax.surgery.convert import batch_norm, models
from bn_jax.surgery.convert.layers import Arrays, Layer
from bn_jax.surgery.convert.network import Framework, dump, load

KEPT = ("axis", "axis_name", "axis_index_groups", "dtype", "param_dtype")


def from_flax(foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any) -> Any:
    """The variables with the parameters and statistics of another Flax model.

    Arguments and errors as for `from_torch`, but for

    Args:
      foreign: (model, variables), as in `bn_jax.surgery`, of Linen or NNX; or (model,
        variables, call) with keyword arguments of its own, in place of those in `options`.
        Its layers are in the order of first calls too.
    """
    return load(_framework(inputs, options), foreign, model, variables, *inputs, **options)


def to_flax(foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any) -> Any:
    """The variables of the model `foreign`, with the model's values: `from_flax`, reversed."""
    return dump(_framework(inputs, options), foreign, model, variables, *inputs, **options)


def layer_from_flax(layer: tuple[Any, Any]) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """The fields of our BatchNorm and its variables, from Flax's. Use as `layer_from_torch`.

    Args:
      layer: (module, variables) of a `flax.linen.BatchNorm`, or (graphdef, state) of a
        `flax.nnx.BatchNorm`.

    Raises:
      ValueError: another layer.
    """
    module, stored = batch_norm.opened(*layer)
    if not isinstance(module, nn.BatchNorm | nnx.BatchNorm):
        raise ValueError(f"not a BatchNorm of Flax, but {type(module).__name__}")
    read = Layer("", ("BatchNorm",), stored, models.settings(module))
    kept = {name: getattr(module, name) for name in KEPT}
    return batch_norm.fields_and_variables([read], models.CODECS, **kept)


def layer_to_flax(layer: Any, variables: Any) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """(keyword arguments of Flax's BatchNorm, Linen's or NNX's; params and batch_stats).

    Args:
      layer, variables: as in `layer_to_torch`.

    Raises:
      TypeError: no BatchNorm of bn_jax.
      ValueError: something that Flax's layer does not have, with what to do.
    """
    fields, arrays = batch_norm.carried(layer, variables, "flax", has=KEPT)
    params = {n: v for n, v in arrays.items() if n in ("scale", "bias")}
    stats = {"batch_stats": {n: arrays[n] for n in ("mean", "var")}}
    return fields, ({"params": params} if params else {}) | stats


def _framework(inputs, options):
    own = {k: v for k, v in options.items() if k not in ("names", "flattened", "unflattened")}

    def read(foreign):
        model, variables, *call = foreign
        return models.read(model, variables, *inputs, **(call[0] if call else own))

    return Framework(read, lambda foreign, new: models.write(foreign[1], new), models.CODECS)
