"""torch: modules and state_dicts. Nothing is unpickled: who loads the file is the caller."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import jax.numpy as jnp

from bn_jax.core.presets import PRESETS
from bn_jax.core.running import cumulative_mean
from bn_jax.surgery.convert import batch_norm
from bn_jax.surgery.convert.layers import (
    Arrays,
    Layer,
    Leaf,
    codec,
    is_a,
    numpy,
    outputs_first,
    outputs_last,
    single_count,
    stored_array,
    transposed,
)
from bn_jax.surgery.convert.network import Framework, dump, load
from bn_jax.surgery.convert.windows import window_of

KINDS = {
    "Linear": "Dense", "Embedding": "Embed", "LayerNorm": "LayerNorm", "GroupNorm": "GroupNorm",
    "_BatchNorm": "BatchNorm",
    **{f"Conv{n}d": "Conv" for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": "ConvTranspose" for n in (1, 2, 3)},
}  # fmt: skip
# By the rank of the weight, for a state_dict, which does not have the layers.
OF_RANK = {1: ("LayerNorm", "GroupNorm"), 2: ("Dense", "Embed")}


def from_torch(foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any) -> Any:
    """The variables with the parameters and statistics of a torch model.

    Layers with parameters are paired in order: of definition there, of first call here.
    Every pair must be of one kind (Dense and DenseGeneral, Conv, ConvTranspose, Embed,
    LayerNorm, GroupNorm, BatchNorm), of the same shapes in Flax's layout, and alike in
    what is known of both (epsilon, momentum, estimator, groups, strides, dilation, and the
    padding in numbers); and nothing may be left over. The values take the template's dtypes.
    torch's ConvTranspose with padding p of a kernel k by dilation d is Flax's with
    padding=(d (k - 1) - p, d (k - 1) - p + output_padding).

        variables = from_torch(
            module, model, variables, images, flattened={"classifier": (64, 7, 7)}, train=False
        )

    A Dense after the flattening of an image needs its rows in another order, since torch
    flattens [C, H, W] and Flax [H, W, C]. Where the shapes of the calls show one, its shape
    must be given.

    Args:
      foreign: a `torch.nn.Module`; or its state_dict, any mapping of names to arrays, of
        which only shapes can be checked.
      model, variables: the template: see `bn_jax.surgery`.
      *inputs: what the model is called with, to find its layers; shapes are enough.
      **options: what it is called with by keyword, `train=False` for instance; and
      names: {layer there: path here}, "/" between its parts, in place of the order.
      flattened: {layer there: [C, *positions] that are flattened into its inputs}, or None
        in place of the shape if the order is the same in both.
      unflattened: the same of the outputs of a layer, from which an image is made.

    Raises:
      TypeError: an array that NumPy cannot read.
      ValueError: a layer that cannot be converted, does not fit, or is left over.
    """
    return load(TORCH, foreign, model, variables, *inputs, **options)


def to_torch(
    foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any
) -> dict[str, Any]:
    """A state_dict of NumPy arrays for the torch model `foreign`, with the model's values.

    `foreign.load_state_dict({name: torch.tensor(v) for name, v in to_torch(...).items()})`.
    Arguments and errors as for `from_torch`, whose inverse it is. A number of updates that
    ours does not have stays the foreign model's.
    """
    return dump(TORCH, foreign, model, variables, *inputs, **options)


def layer_from_torch(layer: Any) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """The fields of our BatchNorm and its variables, from a `torch.nn.BatchNorm1d`, 2d or 3d.

    momentum 0.1 is 0.9 here, None is `estimator=cumulative_mean`, num_batches_tracked the
    count where ours has one, `affine=False` neither scale nor bias.

        fields, variables = layer_from_torch(layer)
        y = bn_jax.linen.BatchNorm(**fields).apply(variables, x, use_running_average=True)
        norm = bn_jax.nnx.BatchNorm(features, **fields, rngs=rngs)
        nnx.update(norm, variables["params"] | variables["batch_stats"])

    The features are the last axis: for inputs in torch's layout add `axis=1`.

    Raises:
      ValueError: another layer, one without running statistics (track_running_stats), or a
        SyncBatchNorm, whose replicas ours names.
    """
    if is_a(layer, {"SyncBatchNorm": "SyncBatchNorm"}):
        raise ValueError(
            "SyncBatchNorm shares statistics over replicas: convert a BatchNorm2d with its "
            "state_dict, and give ours an axis_name"
        )
    return batch_norm.fields_and_variables(_read(layer), CODECS)


def layer_to_torch(layer: Any, variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keyword arguments of `torch.nn.BatchNorm2d`, its state_dict as NumPy arrays).

    num_batches_tracked is 0 where our layer does not count: torch looks at it only with
    momentum=None.

    Args:
      layer, variables: a `bn_jax.linen.BatchNorm` with its variables, or the GraphDef and
        the State of a `bn_jax.nnx.BatchNorm`.

    Raises:
      TypeError: no BatchNorm of bn_jax.
      ValueError: something that torch's layer does not have, with what to do.
    """
    fields, arrays = batch_norm.carried(
        layer, variables, "torch", estimators=(PRESETS["torch"]["estimator"], cumulative_mean),
        affine=True,
    )  # fmt: skip
    momentum = fields.get("momentum")
    settings = {
        "num_features": arrays["mean"].size,
        "eps": fields["epsilon"],
        "momentum": None if momentum is None else complement(momentum),
        "affine": fields["use_scale"],
    }
    stored = CODECS["BatchNorm"].encode(arrays, fields)
    return settings, {name: numpy(v) for name, v in stored.items()}


def complement(momentum: float) -> float:
    """1 - momentum, of the digits that are written: 0.1 is 0.9, and 0.9 is 0.1."""
    return float(1 - Decimal(repr(float(momentum))))


def _read(foreign: Any) -> list[Layer]:
    """The layers of a module, or of a state_dict: of those no settings are known."""
    is_module = hasattr(foreign, "named_modules")
    modules = dict(foreign.named_modules(remove_duplicate=False)) if is_module else {}
    for name, module in modules.items():
        if is_a(module, KINDS) == "BatchNorm" and module.running_mean is None:
            raise ValueError(
                f"{name or 'the BatchNorm'} has no running statistics, which ours always has: "
                "construct it with track_running_stats=True"
            )
    stored: dict[str, Arrays] = {}
    for key, v in (foreign.state_dict() if is_module else foreign).items():
        name, _, leaf = key.rpartition(".")
        stored.setdefault(name, {})[leaf] = stored_array(v, key)
    return [_layer(name, arrays, modules.get(name)) for name, arrays in stored.items()]


def _layer(name, arrays, module):
    if module is None:
        return Layer(name, _kinds(name, arrays), arrays, channels_first=True)
    kind = is_a(module, KINDS)
    if kind is None:
        raise ValueError(f"cannot convert {name}, a {type(module).__name__}")
    return Layer(name, (kind,), arrays, _settings(kind, module), channels_first=True)


def _kinds(name, arrays):
    if "running_mean" in arrays:
        return ("BatchNorm",)
    if "weight" not in arrays:
        raise ValueError(f"cannot convert {name}: it has {', '.join(arrays)} and no weight")
    return OF_RANK.get(arrays["weight"].ndim, ("Conv", "ConvTranspose"))


def _settings(kind, module):
    match kind:
        case "BatchNorm":
            averaged = {"estimator": cumulative_mean}
            if module.momentum is not None:
                averaged = {"momentum": complement(module.momentum)}
            return batch_norm.settings("torch", epsilon=module.eps, **averaged)
        case "LayerNorm":
            return {"epsilon": module.eps}
        case "GroupNorm":
            return {"epsilon": module.eps, "num_groups": module.num_groups}
        case "Conv" | "ConvTranspose":
            return {"feature_group_count": module.groups} | window_of(kind, module)
    return {}


def _write(foreign: Any, new: dict[str, Arrays]) -> dict[str, Any]:
    names = {
        f"{name}.{leaf}".lstrip("."): numpy(v)
        for name, arrays in new.items()
        for leaf, v in arrays.items()
    }
    keys = foreign.state_dict() if hasattr(foreign, "state_dict") else foreign
    return {key: names[key] for key in keys}


CODECS = {
    "Dense": codec(kernel=Leaf("weight", jnp.transpose, jnp.transpose), bias=Leaf("bias")),
    "Conv": codec(kernel=Leaf("weight", outputs_last, outputs_first), bias=Leaf("bias")),
    # Stored as the kernel of the convolution that it is the transpose of: [in, out, *window].
    "ConvTranspose": codec(
        kernel=Leaf(
            "weight",
            lambda v: transposed(outputs_last(v)),
            lambda v: outputs_first(transposed(v)),
        ),
        bias=Leaf("bias"),
    ),
    "Embed": codec(embedding=Leaf("weight")),
    "LayerNorm": codec(scale=Leaf("weight"), bias=Leaf("bias")),
    "GroupNorm": codec(scale=Leaf("weight"), bias=Leaf("bias")),
    "BatchNorm": codec(
        scale=Leaf("weight"), bias=Leaf("bias"), mean=Leaf("running_mean"),
        var=Leaf("running_var"), count=Leaf("num_batches_tracked", encode=single_count),
    ),
}  # fmt: skip
TORCH = Framework(_read, _write, CODECS)
