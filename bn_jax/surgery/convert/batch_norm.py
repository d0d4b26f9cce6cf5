"""A single BatchNorm with its settings: what every framework's two functions share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from bn_jax.core.presets import PRESETS
from bn_jax.core.running import BatchStats, ema
from bn_jax.surgery.calls import OURS
from bn_jax.surgery.convert.layers import Arrays, Layer, Settings
from bn_jax.surgery.tree import by_layer

# What no other framework's layer has, and what it is without it.
ABSENT = {
    "activation": None, "skip_nonfinite": False, "dtype": None, "param_dtype": jnp.float32,
    "axis_name": None, "axis_index_groups": None,
}  # fmt: skip
Read = tuple[dict[str, Any], dict[str, Arrays]]


def settings(framework: str, **values: Any) -> Settings:
    """The settings of a framework's layer, as those of ours: `bn_jax.core.presets`."""
    known: dict[str, Any] = {"layer": "BatchNorm"} | PRESETS[framework] | values
    if known["estimator"] is not PRESETS[framework]["estimator"]:
        del known["momentum"]
    return Settings(**known)


def only(layers: list[Layer]) -> Layer:
    """The BatchNorm that is the only layer; or a ValueError."""
    if [[*layer.codecs] for layer in layers] != [["BatchNorm"]]:
        kinds = ("/".join(v.codecs) or getattr(v.cls, "__name__", v.name) for v in layers)
        raise ValueError(
            f"not a BatchNorm, but {' and '.join(kinds) or 'nothing that has parameters'}"
        )
    return layers[0]


def fields_and_variables(known: Settings, arrays: Arrays, **fields: Any) -> Read:
    """What `layer_from_...` returns: (fields of our BatchNorm, params and batch_stats).

    Of the settings of a layer and its arrays, by Flax's names, and further fields of ours.
    """
    params = {n: arrays[n] for n in ("scale", "bias") if n in arrays}
    stats = {n: arrays[n] for n in ("mean", "var")}
    said = {n: getattr(known, n) for n in ("estimator", "momentum", "epsilon", "unbiased")}
    fields = {n: v for n, v in said.items() if v is not None} | fields
    fields |= {f"use_{n}": n in params for n in ("scale", "bias")}
    if fields["estimator"] is not ema:
        stats["count"] = jnp.full(stats["var"].shape, arrays["count"], jnp.int32)
    return fields, ({"params": params} if params else {}) | {"batch_stats": stats}


def carried(
    layer: Any,
    variables: Any,
    framework: str,
    estimators: Collection[Callable[..., BatchStats]] = (),
    affine: bool = False,
    has: Collection[str] = (),
) -> tuple[dict[str, Any], Arrays]:
    """(fields of our layer, its arrays), if the framework has a layer of these fields.

    The arrays have a count in any case: 0 where the layer does not count.

    Args:
      layer, variables: a Linen BatchNorm with its variables, or an NNX GraphDef and State.
      estimators: those of the framework, if not that of its preset alone.
      affine: whether scale and bias come together there.
      has: fields of `ABSENT` that the framework has, and axis if it can have several.

    Raises:
      TypeError: not a BatchNorm of bn_jax.
      ValueError: a field that it does not have, and what to do.
    """
    module, arrays = opened(layer, variables)
    if type(module) not in OURS:
        raise TypeError(
            f"{type(module).__name__} is no BatchNorm of bn_jax, which alone has its like "
            "elsewhere: convert a BatchNorm with its variables"
        )
    preset = PRESETS[framework]
    estimators = estimators or (preset["estimator"],)
    for field, value, instead in _absent(module, estimators, preset["unbiased"], affine, has):
        value, instead = (getattr(v, "__name__", v) for v in (value, instead))
        raise ValueError(
            f"{framework}'s BatchNorm has no {field}={value}: convert a copy of the layer with "
            f"{field}={instead}"
        )
    names = ("epsilon", "use_scale", "use_bias", *has)
    fields = {"axis": _axes(module)[0]} | {name: getattr(module, name) for name in names}
    if module.estimator is preset["estimator"]:
        fields["momentum"] = float(module.momentum)
    return fields, {"count": jnp.int32(0)} | arrays


def opened(layer: Any, variables: Any) -> tuple[Any, Arrays]:
    """The module of a Linen module or an NNX GraphDef with its variables; its arrays."""
    linen = isinstance(layer, nn.Module)
    module = layer if linen else nnx.merge(layer, variables, copy=True)
    return module, by_layer(variables, nnx.Variable).get((), {})


def _axes(module):
    return (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)


def _absent(module, estimators, unbiased, affine, has) -> Iterator[tuple[str, Any, Any]]:
    """(field, its value, what to have instead) of all that the framework's layer has not."""
    for name, absent in ABSENT.items():
        if name not in has and getattr(module, name) != absent:
            yield name, getattr(module, name), absent
    if module.estimator not in estimators:
        yield "estimator", module.estimator, " or ".join(e.__name__ for e in estimators)
    if module.unbiased != unbiased:
        yield "unbiased", module.unbiased, unbiased
    if callable(module.momentum):
        yield "momentum", "a schedule", "a number"
    if affine and module.use_scale != module.use_bias:
        yield "use_scale", module.use_scale, "scale and bias are both or none"
    if len(_axes(module)) != 1 and "axis" not in has:
        yield "axis", module.axis, "one axis of features"
