"""Keras 3, on any of its backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bn_jax.surgery.convert import batch_norm
from bn_jax.surgery.convert.layers import (
    Arrays,
    Layer,
    Leaf,
    codec,
    is_a,
    numpy,
    stored_array,
    transposed,
)
from bn_jax.surgery.convert.network import Framework, dump, load
from bn_jax.surgery.convert.windows import window

KINDS = {
    "Dense": "Dense", "Embedding": "Embed", "LayerNormalization": "LayerNorm",
    "GroupNormalization": "GroupNorm", "BatchNormalization": "BatchNorm",
    **{f"Conv{n}D": "Conv" for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": "Conv" for n in (1, 2)},
    **{f"Conv{n}DTranspose": "ConvTranspose" for n in (1, 2, 3)},
}  # fmt: skip
# Of layers that compute something else when they are on.
REFUSED = ("renorm", "synchronized", "rms_scaling")


def from_keras(foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any) -> Any:
    """The variables with the weights of a Keras model that is built.

    Arguments and errors as for `from_torch`; layers are in the order of `foreign.layers`,
    those of a model within the model in its place, with "/" between the names.
    """
    return load(KERAS, foreign, model, variables, *inputs, **options)


def to_keras(
    foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any
) -> list[Any]:
    """NumPy arrays for `foreign.set_weights`, with the model's values.

    Arguments and errors as for `from_keras`.
    """
    return dump(KERAS, foreign, model, variables, *inputs, **options)


def layer_from_keras(layer: Any) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """The fields of our BatchNorm and its variables, from `keras.layers.BatchNormalization`.

    Use as `layer_from_torch`; the axis is Keras's.

    Raises:
      ValueError: another layer, or one with renorm or synchronized.
    """
    axis = {"axis": layer.axis} if is_a(layer, KINDS) == "BatchNorm" else {}
    return batch_norm.fields_and_variables(_read(layer), CODECS, **axis)


def layer_to_keras(layer: Any, variables: Any) -> tuple[dict[str, Any], list[Any]]:
    """(keyword arguments of `keras.layers.BatchNormalization`, arrays for its `set_weights`).

    Args:
      layer, variables: as in `layer_to_torch`.

    Raises:
      TypeError: no BatchNorm of bn_jax.
      ValueError: something that Keras's layer does not have, with what to do.
    """
    fields, arrays = batch_norm.carried(layer, variables, "keras")
    settings = {name: fields[name] for name in ("axis", "momentum", "epsilon")} | {
        "scale": fields["use_scale"],
        "center": fields["use_bias"],
    }
    stored = CODECS["BatchNorm"].encode(arrays, fields)
    return settings, [numpy(v) for v in stored.values()]


def _layers(model: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The layers with weights, and their names, within models too."""
    for layer in getattr(model, "layers", [model]):
        name = f"{above}{layer.name}"
        if hasattr(layer, "layers"):
            yield from _layers(layer, f"{name}/")
        elif layer.weights:
            yield name, layer


def _read(foreign: Any) -> list[Layer]:
    layers = list(_layers(foreign))
    known = {id(v) for _, layer in layers for v in layer.weights}
    if own := [v.path for v in foreign.weights if id(v) not in known]:
        raise ValueError(f"cannot convert {', '.join(own)}: of no layer")
    first = any(getattr(v, "data_format", "") == "channels_first" for _, v in layers)
    return [_layer(name, layer, first) for name, layer in layers]


def _layer(name, layer, channels_first):
    kind = is_a(layer, KINDS)
    refused = [f"{flag}=True" for flag in REFUSED if getattr(layer, flag, False)]
    if kind is None or refused:
        what = f"{type(layer).__name__} {' '.join(refused)}".rstrip()
        raise ValueError(f"cannot convert {name}, a {what}: Flax's layers have no such thing")
    stored = {v.name: stored_array(v, v.path) for v in layer.weights}
    if hasattr(layer, "depth_multiplier"):
        # [*window, in, multiplier]: the outputs of one input are next to each other.
        kernel = stored["kernel"]
        stored["kernel"] = kernel.reshape(*kernel.shape[:-2], 1, -1)
    return Layer(name, (kind,), stored, _settings(kind, layer), channels_first=channels_first)


def _settings(kind, layer):
    match kind:
        case "BatchNorm":
            return batch_norm.settings("keras", momentum=layer.momentum, epsilon=layer.epsilon)
        case "LayerNorm":
            return {"epsilon": layer.epsilon}
        case "GroupNorm":
            return {"epsilon": layer.epsilon, "num_groups": layer.groups}
        case "Conv" if hasattr(layer, "depth_multiplier"):
            return _window(layer)
        case "Conv":
            return {"feature_group_count": layer.groups} | _window(layer)
        case "ConvTranspose" if layer.output_padding is None:
            return _window(layer)
    return {}


def _window(layer):
    return window(len(layer.kernel_size), layer.strides, layer.dilation_rate, layer.padding)


def _write(foreign: Any, new: dict[str, Arrays]) -> list[Any]:
    values = {
        id(v): new[name][v.name] for name, layer in _layers(foreign) for v in layer.weights
    }
    return [numpy(values[id(v)].reshape(v.shape)) for v in foreign.weights]


CODECS = {
    "Dense": codec(kernel=Leaf("kernel"), bias=Leaf("bias")),
    "Conv": codec(kernel=Leaf("kernel"), bias=Leaf("bias")),
    "ConvTranspose": codec(kernel=Leaf("kernel", transposed, transposed), bias=Leaf("bias")),
    "Embed": codec(embedding=Leaf("embeddings")),
    "LayerNorm": codec(scale=Leaf("gamma"), bias=Leaf("beta")),
    "GroupNorm": codec(scale=Leaf("gamma"), bias=Leaf("beta")),
    "BatchNorm": codec(
        scale=Leaf("gamma"), bias=Leaf("beta"), mean=Leaf("moving_mean"),
        var=Leaf("moving_variance"),
    ),
}  # fmt: skip
KERAS = Framework(_read, _write, CODECS)
