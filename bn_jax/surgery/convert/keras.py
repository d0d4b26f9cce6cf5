"""Keras 3, on any of its backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bn_jax.surgery.convert import batch_norm, layers
from bn_jax.surgery.convert.beside import plain
from bn_jax.surgery.convert.layers import Arrays, Layer, Leaf, Settings, stored_array
from bn_jax.surgery.convert.network import Conversion, Framework

if TYPE_CHECKING:
    import keras

KINDS = {
    "Dense": "Dense", "Embedding": "Embed", "LayerNormalization": "LayerNorm",
    "GroupNormalization": "GroupNorm", "BatchNormalization": "BatchNorm",
    **{f"Conv{n}D": "Conv" for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": "Conv" for n in (1, 2)},
    **{f"Conv{n}DTranspose": "ConvTranspose" for n in (1, 2, 3)},
}  # fmt: skip
# Of layers that compute something else when they are on.
REFUSED = ("renorm", "synchronized", "rms_scaling")


def from_keras(
    foreign: keras.Model, model: Any, variables: Any, *inputs: Any, **options: Any
) -> Any:
    """The variables with the weights of a Keras model that is built.

    Arguments and errors as for `from_torch`; layers are in the order of `foreign.layers`,
    those of a model within the model in its place, with "/" between the names. Images are in
    Keras's own layout if no layer has data_format="channels_first".
    """
    return Conversion(KERAS, foreign, model, variables, inputs, options).result()


def to_keras(
    foreign: keras.Model, model: Any, variables: Any, *inputs: Any, **options: Any
) -> list[np.ndarray]:
    """NumPy arrays for `foreign.set_weights`, with the model's values.

    Arguments and errors as for `from_keras`.
    """
    return Conversion(KERAS, foreign, model, variables, inputs, options, back=True).result()


def layer_from_keras(layer: keras.Layer) -> batch_norm.Read:
    """The fields of our BatchNorm and its variables, from `keras.layers.BatchNormalization`.

    Use as `layer_from_torch`; the axis is Keras's.

    Raises:
      ValueError: another layer, or one with renorm or synchronized.
    """
    read = batch_norm.only(_read(layer))
    arrays = read.decoded("BatchNorm")
    return batch_norm.fields_and_variables(read.settings, arrays, axis=layer.axis)


def layer_to_keras(layer: Any, variables: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(keyword arguments of `keras.layers.BatchNormalization`, arrays for its `set_weights`).

    Arguments and errors as for `layer_to_torch`.
    """
    fields, arrays = batch_norm.carried(layer, variables, "keras")
    settings = {name: fields[name] for name in ("axis", "momentum", "epsilon")}
    settings |= {"scale": fields["use_scale"], "center": fields["use_bias"]}
    stored = layers.encode(CODECS["BatchNorm"], arrays)
    return settings, [layers.numpy(v) for v in stored.values()]


def _layers(model: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The layers with weights, and their names, within models too."""
    for layer in getattr(model, "layers", [model]):
        name = f"{above}{layer.name}"
        if hasattr(layer, "layers"):
            yield from _layers(layer, f"{name}/")
        elif layer.weights:
            yield name, layer


def _read(foreign: Any) -> list[Layer]:
    named = list(_layers(foreign))
    known = {id(v) for _, layer in named for v in layer.weights}
    own = {v.path: stored_array(v, v.path) for v in foreign.weights if id(v) not in known}
    first = any(getattr(v, "data_format", "") == "channels_first" for _, v in named)
    found = [_layer(name, layer, first) for name, layer in named]
    return [*found, Layer("", own)] if own else found


def _layer(name: str, layer: Any, channels_first: bool) -> Layer:
    kind = layers.is_a(layer, KINDS)
    if refused := [f"{flag}=True" for flag in REFUSED if getattr(layer, flag, False)]:
        what = f"{type(layer).__name__} {' '.join(refused)}"
        raise ValueError(f"cannot convert {name}, a {what}: Flax's layers have no such thing")
    stored = {v.name: stored_array(v, v.path) for v in layer.weights}
    if kind is None:
        return Layer(name, stored, cls=type(layer))
    if hasattr(layer, "depth_multiplier"):
        # [*window, in, multiplier]: the outputs of one input are next to each other.
        kernel = stored["kernel"]
        stored["kernel"] = kernel.reshape(*kernel.shape[:-2], 1, -1)
    codecs, known = {kind: CODECS[kind]}, _settings(kind, layer)
    return Layer(name, stored, codecs, known, channels_first=channels_first, cls=type(layer))


def _settings(kind: str, layer: Any) -> Settings:
    epsilon, groups = getattr(layer, "epsilon", None), getattr(layer, "groups", None)
    if kind == "BatchNorm":
        return batch_norm.settings("keras", momentum=layer.momentum, epsilon=epsilon)
    if not kind.startswith("Conv"):
        return Settings(epsilon=epsilon, num_groups=groups)
    if getattr(layer, "output_padding", None) is not None:
        return Settings()
    rank = len(layer.kernel_size)
    return layers.window(
        rank, layer.strides, layer.dilation_rate, layer.padding, feature_group_count=groups
    )


def _write(foreign: Any, new: dict[str, Arrays]) -> list[np.ndarray]:
    values = {
        id(v): new[name][v.name]
        for name, layer in _layers(foreign)
        for v in layer.weights
        if v.name in new.get(name, {})
    }
    weights = ((v, values.get(id(v), stored_array(v, v.path))) for v in foreign.weights)
    return [layers.numpy(new.reshape(v.shape)) for v, new in weights]


def _runner(foreign: Any, written: list[np.ndarray] | None) -> Callable[..., Any]:
    """The model, for the time of the call with what is written."""
    from keras import ops  # whoever has a model has it

    def run(*inputs, **call):
        kept = _write(foreign, {})
        # Keras adds biases of rank 1.
        with jax.numpy_rank_promotion("allow"):
            try:
                foreign.set_weights(kept if written is None else written)
                given = [list(inputs)] if hasattr(foreign, "inputs") and inputs[1:] else inputs
                return plain(foreign(*given, training=False, **call), ops.convert_to_numpy)
            finally:
                foreign.set_weights(kept)

    return run


_LINEAR = {"kernel": Leaf("kernel"), "bias": Leaf("bias")}
_AFFINE = {"scale": Leaf("gamma"), "bias": Leaf("beta")}
CODECS = {
    "Dense": _LINEAR,
    "Conv": _LINEAR,
    "ConvTranspose": _LINEAR | {"kernel": Leaf("kernel", layers.transposed, layers.transposed)},
    "Embed": {"embedding": Leaf("embeddings")},
    "LayerNorm": _AFFINE,
    "GroupNorm": _AFFINE,
    "BatchNorm": {**_AFFINE, "mean": Leaf("moving_mean"), "var": Leaf("moving_variance")},
}
KERAS = Framework(_read, _write, _runner)
