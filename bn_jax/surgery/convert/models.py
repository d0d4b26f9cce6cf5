"""The layers of a Flax model that have variables, in the order of their first calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from bn_jax.core.running import ema
from bn_jax.surgery.convert.layers import Arrays, Codec, Layer, Leaf, codec, transposed
from bn_jax.surgery.convert.windows import window
from bn_jax.surgery.intercept import (
    BATCH_NORMS,
    GHOSTS,
    RENORMS,
    Model,
    Path,
    apply,
    intercept,
    spelled,
)
from bn_jax.surgery.kernels import CONV, DENSE, GENERAL, TRANSPOSED
from bn_jax.surgery.tree import by_layer, set_leaves

KINDS = {
    "Dense": DENSE + GENERAL,
    "Conv": CONV,
    "ConvTranspose": TRANSPOSED,
    "Embed": (nn.Embed, nnx.Embed),
    "LayerNorm": (nn.LayerNorm, nnx.LayerNorm),
    "GroupNorm": (nn.GroupNorm, nnx.GroupNorm),
    "BatchNorm": BATCH_NORMS,
}
LAYOUT = {"contracted", "transpose_kernel"}  # settings that need not be alike in a pair


def read(model: Model, variables: Any, *inputs: Any, **call: Any) -> list[Layer]:
    """The layers that a call uses.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with; of the inputs only shapes matter.

    Raises:
      ValueError: a parameter or statistic that is of no layer that is known and called.
    """
    own = by_layer(variables, nnx.Variable)
    found: dict[Path, Layer] = {}

    def hook(one):
        y = one.proceed()
        stored = own.get(one.path)
        if stored:
            layer = Layer(spelled(one.path), (_kind(one.layer),), stored, settings(one.layer))
            found.setdefault(one.path, layer._replace(x=one.x.shape, y=y.shape))
        return y

    watched = intercept(model, variables, hook, sum(KINDS.values(), ()))
    jax.eval_shape(lambda v, x: apply(watched, v, *x, **call), variables, inputs)
    if unknown := by_layer(variables).keys() - found.keys():
        raise ValueError(
            f"cannot convert {', '.join(sorted(map(spelled, unknown)))}: not called, or no "
            f"{', '.join(KINDS)}"
        )
    return list(found.values())


def write(variables: Any, new: dict[str, Arrays]) -> Any:
    """The variables with other arrays in the layers of these names."""
    paths = {spelled(path): path for path in by_layer(variables, nnx.Variable)}
    return set_leaves(variables, {paths[name]: arrays for name, arrays in new.items()})


def settings(layer: Any) -> dict[str, Any]:
    """What must be alike in the layers of a pair, so far as it is known of both."""
    match _kind(layer):
        case "BatchNorm":
            return _batch_norm(layer)
        case "Dense" if isinstance(layer, GENERAL):
            if getattr(layer, "batch_dims", ()) or getattr(layer, "batch_axis", {}):
                raise ValueError(
                    f"cannot convert {layer}: it has a kernel for every batch axis"
                )
            return {"contracted": len(layer.axis) if isinstance(layer.axis, Sequence) else 1}
        case "LayerNorm":
            return {"epsilon": layer.epsilon}
        case "GroupNorm":
            groups = {"num_groups": layer.num_groups} if layer.num_groups else {}
            return {"epsilon": layer.epsilon} | groups
        case "ConvTranspose":
            alone = {"feature_group_count": 1}  # Flax's has no groups
            return {"transpose_kernel": layer.transpose_kernel} | alone | _window(layer)
        case "Conv":
            return {"feature_group_count": layer.feature_group_count} | _window(layer)
    return {}


def _window(layer):
    rank = len(layer.kernel_size) if isinstance(layer.kernel_size, Sequence) else 1
    return window(rank, layer.strides, layer.kernel_dilation, layer.padding)


def _batch_norm(layer):
    variant = [c.__name__ for c in GHOSTS + RENORMS if isinstance(layer, c)]
    return {
        "layer": variant[0] if variant else "BatchNorm",
        "estimator": getattr(layer, "estimator", ema),
        "momentum": layer.momentum,
        "epsilon": layer.epsilon,
        "unbiased": getattr(layer, "unbiased", False),
    }


def _kind(layer):
    return next(kind for kind, classes in KINDS.items() if isinstance(layer, classes))


def _decode_dense(layer):
    contracted = layer.settings.get("contracted", 1)
    kernel = layer.stored["kernel"]
    rows = kernel.reshape(-1, *kernel.shape[contracted:])
    bias = {name: v.reshape(-1) for name, v in layer.stored.items() if name == "bias"}
    return {"kernel": rows.reshape(len(rows), -1)} | bias


def _decode_transpose(layer):
    kernel = layer.stored["kernel"]
    return layer.stored | {
        "kernel": transposed(kernel) if layer.settings["transpose_kernel"] else kernel
    }


def _encode_transpose(arrays, settings):
    kernel = arrays["kernel"]
    return arrays | {"kernel": transposed(kernel) if settings["transpose_kernel"] else kernel}


def _same(*names):
    return codec(**{name: Leaf(name) for name in names})


_LINEAR = frozenset({"kernel", "bias"})
CODECS = {
    "Dense": Codec(_LINEAR, _decode_dense, lambda arrays, settings: arrays),
    "Conv": _same("kernel", "bias"),
    "ConvTranspose": Codec(_LINEAR, _decode_transpose, _encode_transpose),
    "Embed": _same("embedding"),
    "LayerNorm": _same("scale", "bias"),
    "GroupNorm": _same("scale", "bias"),
    "BatchNorm": _same("scale", "bias", "mean", "var", "count"),
}
