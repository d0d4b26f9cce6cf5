"""Flax: between Linen and NNX, and between Flax's layers and ours."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from flax import nnx

from bn_jax.surgery.calls import Adapter
from bn_jax.surgery.convert import batch_norm, models
from bn_jax.surgery.convert.layers import Arrays
from bn_jax.surgery.convert.network import Conversion, Framework, split
from bn_jax.surgery.intercept import known

KEPT = ("axis", "axis_name", "axis_index_groups", "dtype", "param_dtype")


def from_flax(foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any) -> Any:
    """The variables with the parameters and statistics of another Flax model.

    Arguments and errors as for `from_torch`, but for

    Args:
      foreign: (model, variables), as in `bn_jax.surgery`, of Linen or NNX; or (model,
        variables, call) with keyword arguments of its own, in place of those in `options`.
        Its layers are in the order of first calls too.
    """
    framework = _framework(inputs, options)
    return Conversion(framework, foreign, model, variables, inputs, options).result()


def to_flax(foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any) -> Any:
    """The variables of the model `foreign`, with the model's values: `from_flax`, reversed."""
    framework = _framework(inputs, options)
    return Conversion(framework, foreign, model, variables, inputs, options, back=True).result()


def layer_from_flax(layer: tuple[Any, Any]) -> batch_norm.Read:
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
    kept = {name: getattr(module, name) for name in KEPT}
    settings = models.batch_norm_settings(module, Adapter())
    return batch_norm.fields_and_variables(settings, stored, **kept)


def layer_to_flax(layer: Any, variables: Any) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """(keyword arguments of Flax's BatchNorm, Linen's or NNX's; params and batch_stats).

    Arguments and errors as for `layer_to_torch`.
    """
    fields, arrays = batch_norm.carried(layer, variables, "flax", has=KEPT)
    params = {n: v for n, v in arrays.items() if n in ("scale", "bias")}
    stats = {"batch_stats": {n: arrays[n] for n in ("mean", "var")}}
    return fields, ({"params": params} if params else {}) | stats


def _framework(inputs, options) -> Framework:
    own, call = split(options)
    norms = known(own.batch_norms)

    def opened(foreign):
        model, variables, *said = foreign
        return model, variables, (said[0] if said else call)

    def read(foreign):
        model, variables, call = opened(foreign)
        return models.read(model, variables, inputs, call, norms)

    def runner(foreign, written):
        model, variables, call = opened(foreign)
        run = models.run(model, call)
        return lambda *inputs: run(variables if written is None else written, inputs)

    return Framework(read, lambda foreign, new: models.write(foreign[1], new), runner)
