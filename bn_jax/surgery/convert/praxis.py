"""praxis: a single BatchNorm, by its formula; its scale is 1 + gamma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bn_jax.surgery.convert import batch_norm
from bn_jax.surgery.convert.layers import Arrays, Layer, Leaf, codec, numpy, stored_array


def layer_from_praxis(
    layer: Mapping[str, Any], **settings: float
) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """The fields of our BatchNorm and its variables, from praxis's. Use as `layer_from_torch`.

    Args:
      layer: its arrays beta, gamma, moving_mean and moving_variance.
      **settings: decay (0.999) and epsilon (0.001), if they are not praxis's.

    Raises:
      ValueError: other arrays, or another setting.
    """
    if layer.keys() != CODECS["BatchNorm"].names or settings.keys() - DEFAULTS.keys():
        raise ValueError(
            f"praxis's BatchNorm has {', '.join(sorted(CODECS['BatchNorm'].names))} and the "
            f"settings {', '.join(DEFAULTS)}, not {', '.join([*layer, *settings])}"
        )
    settings = DEFAULTS | settings
    known = batch_norm.settings("flax", momentum=settings["decay"], epsilon=settings["epsilon"])
    stored = {name: stored_array(v, name) for name, v in layer.items()}
    return batch_norm.fields_and_variables([Layer("", ("BatchNorm",), stored, known)], CODECS)


def layer_to_praxis(layer: Any, variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, arrays) of praxis's BatchNorm, as `layer_from_praxis` takes them.

    Args:
      layer, variables: as in `layer_to_torch`.

    Raises:
      TypeError: no BatchNorm of bn_jax.
      ValueError: something that praxis's layer does not have, with what to do.
    """
    fields, arrays = batch_norm.carried(layer, variables, "praxis")
    if not (fields["use_scale"] and fields["use_bias"]):
        raise ValueError("praxis's BatchNorm has a scale and a bias: use_scale=use_bias=True")
    stored = CODECS["BatchNorm"].encode(arrays, fields)
    settings = {"decay": fields["momentum"], "epsilon": fields["epsilon"]}
    return settings, {name: numpy(v) for name, v in stored.items()}


DEFAULTS = {"decay": 0.999, "epsilon": 1e-3}
CODECS = {
    "BatchNorm": codec(
        scale=Leaf("gamma", lambda v: v + 1, lambda v: v - 1), bias=Leaf("beta"),
        mean=Leaf("moving_mean"), var=Leaf("moving_variance"),
    )
}  # fmt: skip
