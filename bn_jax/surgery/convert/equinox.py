"""Equinox: (model, state), as `equinox.nn.make_with_state` returns them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bn_jax.surgery.convert import batch_norm
from bn_jax.surgery.convert.layers import (
    Arrays,
    Codec,
    Layer,
    Leaf,
    codec,
    is_a,
    outputs_first,
    outputs_last,
    single_count,
    stored_array,
    vector,
)
from bn_jax.surgery.convert.network import Framework, dump, load
from bn_jax.surgery.convert.windows import window_of

KINDS = {
    "Linear": "Dense", "Embedding": "Embed", "LayerNorm": "LayerNorm", "GroupNorm": "GroupNorm",
    "BatchNorm": "BatchNorm", "Conv": "Conv", "ConvTranspose": "ConvTranspose",
}  # fmt: skip


def from_equinox(foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any) -> Any:
    """The variables with the parameters and statistics of an Equinox model.

    Arguments and errors as for `from_torch`, but for

    Args:
      foreign: (model, state). Layers are in the order of the model's fields, named by their
        places: "layers[0].conv".

    Raises:
      ValueError: also a BatchNorm with mode="ema", which normalises by its running
        statistics in training.
    """
    return load(EQUINOX, foreign, model, variables, *inputs, **options)


def to_equinox(
    foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any
) -> tuple[Any, Any]:
    """(model, state) like `foreign`, with our values; `foreign` stays as it is.

    Arguments and errors as for `from_equinox`.
    """
    return dump(EQUINOX, foreign, model, variables, *inputs, **options)


def layer_from_equinox(layer: tuple[Any, Any]) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """The fields of our BatchNorm and its variables, from an `equinox.nn.BatchNorm`.

    Its hidden averages become the statistics that it normalises by. Use as
    `layer_from_torch`: the batch is the inputs' first axis, in place of an `axis_name`.

    Args:
      layer: (layer, state).

    Raises:
      ValueError: another layer; mode="ema", of which only inference is like ours; or more
        names of axes than the batch's.
    """
    module, _ = layer
    layers = _read(layer)
    axis_name = getattr(module, "axis_name", None)
    if isinstance(axis_name, tuple | list) and len(axis_name) > 1:
        raise ValueError(
            f"axis_name={axis_name}: convert a layer with the batch's name alone, and "
            "give ours the axis_name of the replicas"
        )
    return batch_norm.fields_and_variables(layers, CODECS)


def layer_to_equinox(layer: Any, variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keyword arguments of `equinox.nn.BatchNorm` but axis_name, its values).

    The values are weight and bias, and what `state.set` takes for `batch_counter` and
    `batch_state_index`. All of them at once: `to_equinox((layer, state), ours, variables, x)`.

    Args:
      layer, variables: as in `layer_to_torch`.

    Raises:
      TypeError: no BatchNorm of bn_jax.
      ValueError: something that Equinox's layer does not have, with what to do.
    """
    fields, arrays = batch_norm.carried(layer, variables, "equinox", affine=True)
    settings = {
        "input_size": arrays["mean"].size,
        "eps": fields["epsilon"],
        "momentum": fields["momentum"],
        "channelwise_affine": fields["use_scale"],
        "mode": "batch",
    }
    stored = CODECS["BatchNorm"].encode(arrays, fields)
    hidden = stored.pop("hidden_mean"), stored.pop("hidden_var")
    counter = int(stored.pop("batch_counter"))
    return settings, stored | {"batch_counter": counter, "batch_state_index": hidden}


def _is_layer(value):
    return is_a(value, KINDS) is not None and hasattr(value, "__dataclass_fields__")


def _found(model: Any) -> dict[str, Any]:
    """The layers, and whatever else has arrays, by place."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_layer)
    return {
        jax.tree_util.keystr(path).lstrip("."): v
        for path, v in leaves
        if _is_layer(v) or hasattr(v, "dtype")
    }


def _read(foreign: Any) -> list[Layer]:
    model, state = foreign
    layers = [_layer(name, layer, state) for name, layer in _found(model).items()]
    return [layer for layer in layers if layer.stored]


def _layer(name, layer, state):
    kind = is_a(layer, KINDS)
    if kind is None:
        raise ValueError(f"cannot convert {name}, of no layer that Flax has")
    stored = {
        leaf: getattr(layer, leaf)
        for leaf in ("weight", "bias")
        if getattr(layer, leaf, None) is not None
    }
    if kind == "BatchNorm":
        if layer.mode != "batch":
            raise ValueError(
                f"{name or 'the BatchNorm'} has mode={layer.mode!r}, which normalises by "
                'running statistics in training, as ours does not: use mode="batch"'
            )
        stored["batch_counter"] = state.get(layer.batch_counter)
        stored["hidden_mean"], stored["hidden_var"] = state.get(layer.batch_state_index)
    stored = {leaf: stored_array(v, f"{name}.{leaf}") for leaf, v in stored.items()}
    return Layer(name, (kind,), stored, _settings(kind, layer), channels_first=True)


def _settings(kind, layer):
    match kind:
        case "BatchNorm":
            return batch_norm.settings("equinox", momentum=layer.momentum, epsilon=layer.eps)
        case "LayerNorm":
            return {"epsilon": layer.eps}
        case "GroupNorm":
            return {"epsilon": layer.eps, "num_groups": layer.groups}
        case "Conv" | "ConvTranspose":
            return {"feature_group_count": layer.groups} | window_of(kind, layer)
    return {}


def _write(foreign: Any, new: dict[str, Arrays]) -> tuple[Any, Any]:
    model, state = foreign
    # `state.set` makes the state that it is given unusable.
    state = jax.tree.map(jnp.asarray, state)
    for name, layer in _found(model).items():
        if is_a(layer, KINDS) == "BatchNorm":
            arrays = new[name]
            # In the type that it has, which is weak and must remain so.
            count = state.get(layer.batch_counter) * 0 + int(arrays["batch_counter"])
            state = state.set(layer.batch_counter, count)
            hidden = arrays["hidden_mean"], arrays["hidden_var"]
            state = state.set(layer.batch_state_index, hidden)

    def replaced(path, layer):
        arrays = new.get(jax.tree_util.keystr(path).lstrip("."), {})
        return jax.tree_util.tree_map_with_path(
            lambda place, v: arrays.get(jax.tree_util.keystr(place).lstrip("."), v), layer
        )

    return jax.tree_util.tree_map_with_path(replaced, model, is_leaf=_is_layer), state


def _debiasing(count, momentum):
    """1 - momentum^t at update t, as rounded there; before the first nothing is divided."""
    return jnp.where(count == 0, 1, 1 - momentum**count)


def _decode_norm(layer):
    count = layer.stored["batch_counter"]
    debiasing = _debiasing(count, layer.settings["momentum"])
    stats = {n: layer.stored[f"hidden_{n}"] / debiasing for n in ("mean", "var")}
    return _AFFINE.decode(layer) | {"count": count} | stats


def _encode_norm(arrays, settings):
    count = single_count(arrays["count"])
    debiasing = _debiasing(count, settings["momentum"])
    hidden = {f"hidden_{n}": arrays[n] * debiasing for n in ("mean", "var")}
    return _AFFINE.encode(arrays, settings) | hidden | {"batch_counter": count}


_AFFINE = codec(scale=Leaf("weight"), bias=Leaf("bias"))
CODECS = {
    "Dense": codec(kernel=Leaf("weight", jnp.transpose, jnp.transpose), bias=Leaf("bias")),
    "Conv": codec(kernel=Leaf("weight", outputs_last, outputs_first), bias=vector("bias")),
    # A correlation, as Flax's is: it is not reversed.
    "ConvTranspose": codec(
        kernel=Leaf("weight", outputs_last, outputs_first), bias=vector("bias")
    ),
    "Embed": codec(embedding=Leaf("weight")),
    "LayerNorm": _AFFINE,
    "GroupNorm": _AFFINE,
    "BatchNorm": Codec(
        _AFFINE.names | {"batch_counter", "hidden_mean", "hidden_var"},
        _decode_norm,
        _encode_norm,
    ),
}
EQUINOX = Framework(_read, _write, CODECS)
