"""A single BatchNorm with its settings: what every framework's two functions share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from bn_jax.core.presets import PRESETS
from bn_jax.core.running import BatchStats, ema
from bn_jax.surgery.convert.layers import Arrays, Codec, Layer
from bn_jax.surgery.intercept import OURS
from bn_jax.surgery.tree import get_leaves

# What no other framework's layer has, and what it is without it.
ABSENT = {
    "activation": None, "skip_nonfinite": False, "dtype": None, "param_dtype": jnp.float32,
    "axis_name": None, "axis_index_groups": None,
}  # fmt: skip


def settings(framework: str, **values: Any) -> dict[str, Any]:
    """The settings of a framework's layer, as those of ours: `bn_jax.core.presets`."""
    known = {"layer": "BatchNorm"} | PRESETS[framework] | values
    if known["estimator"] is not PRESETS[framework]["estimator"]:
        del known["momentum"]
    return known


def fields_and_variables(
    layers: list[Layer], codecs: dict[str, Codec], **fields: Any
) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """What `layer_from_...` returns: (fields of our BatchNorm, params and batch_stats).

    Args:
      layers: the one that was read, its settings as those of ours.
      codecs: of the framework.
      **fields: in which the framework differs from ours beside its settings.

    Raises:
      ValueError: not a single BatchNorm.
    """
    if [layer.kinds for layer in layers] != [("BatchNorm",)]:
        kinds = " and ".join("/".join(layer.kinds) for layer in layers)
        raise ValueError(f"not a BatchNorm, but {kinds or 'nothing that has parameters'}")
    arrays = codecs["BatchNorm"].decode(layers[0])
    params = {n: arrays[n] for n in ("scale", "bias") if n in arrays}
    stats = {n: arrays[n] for n in ("mean", "var")}
    fields = layers[0].settings | fields
    fields |= {f"use_{n}": n in params for n in ("scale", "bias")}
    del fields["layer"]
    if fields["estimator"] is not ema:
        stats["count"] = jnp.full(stats["var"].shape, arrays["count"], jnp.int32)
    return fields, {"params": params, "batch_stats": stats} if params else {
        "batch_stats": stats
    }


def carried(
    layer: Any,
    variables: Any,
    framework: str,
    *,
    estimators: Collection[Callable[..., BatchStats]] = (),
    affine: bool = False,
    has: Collection[str] = (),
) -> tuple[dict[str, Any], Arrays]:
    """(fields of our layer, its arrays), if the framework has a layer of these fields.

    The arrays have a count in any case: 0 where the layer does not count.

    Args:
      layer, variables: a Linen BatchNorm with its variables, or an NNX one's GraphDef and
        State.
      framework: its name.
      estimators: it has, if not that of its preset.
      affine: scale and bias come together there.
      has: fields of `ABSENT` that this framework has, and axis if it can have several.

    Raises:
      TypeError: not a BatchNorm of bn_jax.
      ValueError: a field that it does not have, and what to do.
    """
    module, arrays = opened(layer, variables)
    _refuse_fields(module, framework, has)
    preset = PRESETS.get(framework, PRESETS["flax"])  # praxis averages as Flax does
    _refuse_averages(
        module, framework, estimators or (preset["estimator"],), preset["unbiased"]
    )
    if affine and module.use_scale != module.use_bias:
        raise _refusal(
            framework, "use_scale", module.use_scale, "scale and bias are both or none"
        )
    axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    if len(axes) != 1 and "axis" not in has:
        raise _refusal(framework, "axis", module.axis, "one axis of features")
    names = ("epsilon", "use_scale", "use_bias", *has)
    fields = {"axis": axes[0]} | {name: getattr(module, name) for name in names}
    if module.estimator is preset["estimator"]:
        fields["momentum"] = float(module.momentum)
    return fields, {"count": jnp.int32(0)} | arrays


def opened(layer: Any, variables: Any) -> tuple[Any, Arrays]:
    """The module of a Linen module or an NNX GraphDef with its variables; its arrays."""
    linen = isinstance(layer, nn.Module)
    module = layer if linen else nnx.merge(layer, variables, copy=True)
    return module, get_leaves(variables, ())


def _refuse_fields(module, framework, has):
    if type(module) not in OURS:
        raise TypeError(
            f"{type(module).__name__} is no BatchNorm of bn_jax, which alone has its like "
            "elsewhere: convert a BatchNorm with its variables"
        )
    for name, absent in ABSENT.items():
        value = getattr(module, name)
        if name not in has and value != absent:
            raise _refusal(framework, name, value, getattr(absent, "__name__", absent))


def _refuse_averages(module, framework, estimators, unbiased):
    if module.estimator not in estimators:
        names = " or ".join(e.__name__ for e in estimators)
        raise _refusal(framework, "estimator", module.estimator.__name__, names)
    if module.unbiased != unbiased:
        raise _refusal(framework, "unbiased", module.unbiased, unbiased)
    if callable(module.momentum):
        raise _refusal(framework, "momentum", "a schedule", "a number")


def _refusal(framework, field, value, instead):
    value = getattr(value, "__name__", value)
    return ValueError(
        f"{framework}'s BatchNorm has no {field}={value}: convert a copy of the layer with "
        f"{field}={instead}"
    )
