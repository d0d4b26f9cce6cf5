"""torch: modules and state_dicts. Nothing is unpickled: who loads the file is the caller."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.core.presets import PRESETS
from bn_jax.core.running import cumulative_mean
from bn_jax.surgery.convert import batch_norm, layers
from bn_jax.surgery.convert.beside import plain
from bn_jax.surgery.convert.layers import Arrays, Layer, Leaf, Settings, stored_array
from bn_jax.surgery.convert.network import Conversion, Framework

if TYPE_CHECKING:
    import torch

    Foreign = torch.nn.Module | Mapping[str, Any]

KINDS = {
    "Linear": "Dense", "Embedding": "Embed", "LayerNorm": "LayerNorm", "GroupNorm": "GroupNorm",
    "_BatchNorm": "BatchNorm",
    **{f"Conv{n}d": "Conv" for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": "ConvTranspose" for n in (1, 2, 3)},
}  # fmt: skip
# By the rank of the weight, for a state_dict, which does not have the layers.
OF_RANK = {0: (), 1: ("LayerNorm", "GroupNorm"), 2: ("Dense", "Embed")}


def from_torch(
    foreign: Foreign, model: Any, variables: Any, *inputs: Any, **options: Any
) -> Any:
    """The variables with the parameters and statistics of a torch model.

    Layers whose names agree are paired ("layer1.0.bn1" and "layer1_0/bn1"), the others in
    order: of definition there, of first call here. Every pair must be of one kind (Dense and
    DenseGeneral, Conv, ConvTranspose, Embed, LayerNorm, GroupNorm, BatchNorm), of the same
    shapes in Flax's layout, and alike in what is known of both. Nothing may be left over. The
    values take the template's dtypes. torch's ConvTranspose with padding p of a kernel k by
    dilation d is Flax's with padding=(d (k - 1) - p, d (k - 1) - p + output_padding).

        variables = from_torch(module, model, variables, images, train=False)

    Then both models are run in evaluation, on the inputs and on noise like them, and every
    output is compared: another padding, a layer with a `forward` of its own, equal layers in
    another order are refused. What no output depends on is not seen. Settings of training
    alone (momentum, estimator, unbiased) are a warning.

    torch flattens [C, H, W] and Flax [H, W, C], so that a Dense after it has its rows in
    another order. Where the Flax model flattens is found by running it; that torch's model
    does it alike, by the comparison.

    Args:
      foreign: a `torch.nn.Module`; or its state_dict, any mapping of names to arrays.
      model, variables: the template: see `bn_jax.surgery`.
      *inputs: what the model is called with, in Flax's layout; the module gets images with
        their channels first.
      **options: what it is called with by keyword, `train=False` for instance; and
      names: {layer there: path here}, "/" between its parts, of all layers.
      flattened: {layer there: [C, *positions] that are flattened into its inputs}, or None
        in place of the shape if the order is the same in both; instead of what is found.
      unflattened: the same of the outputs of a layer, from which an image is made.
      batch_norms: how to read BatchNorms of other classes here: `bn_jax.surgery.Adapter`.
      skip: patterns of names of arrays, on either side, that stay as they are.
      ignore: settings that need not be alike.
      foreign_inputs: what the foreign model is called with, or a function from the inputs to
        it; foreign_call: its keyword arguments.
      expected: its outputs on the inputs, in place of running it.
      tolerance: the largest difference of an output, in units of its largest value (1e-5).
      unchecked: run nothing; for arrays without their model, and inputs that are shapes.
      with_differences: return (variables, {output: its largest difference}).

    Raises:
      TypeError: an array that NumPy cannot read.
      ValueError: a layer that cannot be converted, does not fit, or is left over; outputs
        that differ or are not finite; nothing to run.
    """
    return Conversion(TORCH, foreign, model, variables, inputs, options).result()


def to_torch(
    foreign: Foreign, model: Any, variables: Any, *inputs: Any, **options: Any
) -> dict[str, np.ndarray]:
    """A state_dict of NumPy arrays for the torch model `foreign`, with the model's values.

    `foreign.load_state_dict({name: torch.tensor(v) for name, v in to_torch(...).items()})`.
    Arguments and errors as for `from_torch`, whose inverse it is; there is no `expected`, and
    a copy of the module is run. A number of updates that ours does not have stays its own.
    """
    return Conversion(TORCH, foreign, model, variables, inputs, options, back=True).result()


def layer_from_torch(layer: torch.nn.Module) -> batch_norm.Read:
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
    if layers.is_a(layer, {"SyncBatchNorm": "SyncBatchNorm"}):
        raise ValueError(
            "SyncBatchNorm shares statistics over replicas: convert a BatchNorm2d with its "
            "state_dict, and give ours an axis_name"
        )
    read = batch_norm.only(_read(layer))
    return batch_norm.fields_and_variables(read.settings, read.decoded("BatchNorm"))


def layer_to_torch(layer: Any, variables: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
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
    estimators = PRESETS["torch"]["estimator"], cumulative_mean
    fields, arrays = batch_norm.carried(layer, variables, "torch", estimators, affine=True)
    momentum = fields.get("momentum")
    settings = {
        "num_features": arrays["mean"].size,
        "eps": fields["epsilon"],
        "momentum": None if momentum is None else complement(momentum),
        "affine": fields["use_scale"],
    }
    stored = layers.encode(CODECS["BatchNorm"], arrays)
    return settings, {name: layers.numpy(v) for name, v in stored.items()}


def complement(momentum: float) -> float:
    """1 - momentum, of the digits that are written: 0.1 is 0.9, and 0.9 is 0.1."""
    return float(1 - Decimal(repr(float(momentum))))


def _read(foreign: Foreign) -> list[Layer]:
    """The layers of a module, or of a state_dict: of those no settings are known."""
    alone = isinstance(foreign, Mapping)
    modules = {} if alone else dict(foreign.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if layers.is_a(module, KINDS) == "BatchNorm" and module.running_mean is None:
            raise ValueError(
                f"{name or 'the BatchNorm'} has no running statistics, which ours always has: "
                "construct it with track_running_stats=True"
            )
    stored: dict[str, Arrays] = {}
    for key, v in (foreign if alone else foreign.state_dict()).items():
        name, _, leaf = key.rpartition(".")
        stored.setdefault(name, {})[leaf] = stored_array(v, key)
    return [_layer(name, arrays, modules.get(name)) for name, arrays in stored.items()]


def _layer(name: str, arrays: Arrays, module: torch.nn.Module | None) -> Layer:
    if module is None:
        rank = arrays["weight"].ndim if "weight" in arrays else 0
        kinds = OF_RANK.get(rank, ("Conv", "ConvTranspose"))
        kinds = ("BatchNorm",) if "running_mean" in arrays else kinds
        codecs = {kind: CODECS[kind] for kind in kinds}
        return Layer(name, arrays, codecs, channels_first=True)
    kind = layers.is_a(module, KINDS)
    if kind is None:
        return Layer(name, arrays, cls=type(module))
    codecs, known = {kind: CODECS[kind]}, _settings(kind, module)
    return Layer(name, arrays, codecs, known, channels_first=True, cls=type(module))


def _settings(kind: str, module: Any) -> Settings:
    if kind == "BatchNorm":
        averaged = {"estimator": cumulative_mean}
        if module.momentum is not None:
            averaged = {"momentum": complement(module.momentum)}
        return batch_norm.settings("torch", epsilon=module.eps, **averaged)
    if not kind.startswith("Conv"):
        epsilon, groups = getattr(module, "eps", None), getattr(module, "num_groups", None)
        return Settings(epsilon=epsilon, num_groups=groups)
    rank, padding = len(module.kernel_size), module.padding
    if kind == "ConvTranspose":
        sizes = zip(module.kernel_size, padding, module.dilation, strict=True)
        lows = [d * (k - 1) - p for k, p, d in sizes]
        ends = zip(lows, module.output_padding, strict=True)
        padding = [(low, low + extra) for low, extra in ends]
    more = {"padding_mode": module.padding_mode.upper(), "feature_group_count": module.groups}
    return layers.window(rank, module.stride, module.dilation, padding, **more)


def _write(foreign: Foreign, new: dict[str, Arrays]) -> dict[str, np.ndarray]:
    leaves = ((name, leaf, v) for name, arrays in new.items() for leaf, v in arrays.items())
    names = {f"{name}.{leaf}".lstrip("."): layers.numpy(v) for name, leaf, v in leaves}
    own = foreign if isinstance(foreign, Mapping) else foreign.state_dict()
    return {k: names[k] if k in names else layers.numpy(stored_array(own[k], k)) for k in own}


def _runner(
    foreign: Foreign, written: dict[str, np.ndarray] | None
) -> Callable[..., Any] | None:
    if isinstance(foreign, Mapping):
        return None
    import torch  # whoever has a module has it

    @functools.cache
    def module():
        copied = copy.deepcopy(foreign).eval()
        if written is not None:
            copied.load_state_dict({name: torch.tensor(v) for name, v in written.items()})
        return copied

    def tensor(v, like):
        v = torch.tensor(np.asarray(v), device=like.device)
        if v.is_floating_point():
            return v.to(like.dtype)
        return v if v.dtype == torch.bool else v.long()

    def run(*inputs, **call):
        floats = (v for v in module().state_dict().values() if v.is_floating_point())
        like = next(floats, torch.zeros(()))
        with torch.no_grad():
            outputs = module()(*jax.tree.map(lambda v: tensor(v, like), inputs), **call)
        return plain(outputs, lambda v: torch.as_tensor(v).double().cpu().numpy())

    return run


def _outputs_last(v):
    """[out, in, *window] to [*window, in, out]."""
    return jnp.transpose(v, (*range(2, v.ndim), 1, 0))


def _outputs_first(v):
    """[*window, in, out] to [out, in, *window]."""
    return jnp.transpose(v, (v.ndim - 1, v.ndim - 2, *range(v.ndim - 2)))


# Stored as the kernel of the convolution that it is the transpose of: [in, out, *window].
_TRANSPOSED = Leaf(
    "weight",
    lambda v: layers.transposed(_outputs_last(v)),
    lambda v: _outputs_first(layers.transposed(v)),
)
_BIAS, _AFFINE = {"bias": Leaf("bias")}, {"scale": Leaf("weight"), "bias": Leaf("bias")}
CODECS = {
    "Dense": _BIAS | {"kernel": Leaf("weight", jnp.transpose, jnp.transpose)},
    "Conv": _BIAS | {"kernel": Leaf("weight", _outputs_last, _outputs_first)},
    "ConvTranspose": _BIAS | {"kernel": _TRANSPOSED},
    "Embed": {"embedding": Leaf("weight")},
    "LayerNorm": _AFFINE,
    "GroupNorm": _AFFINE,
    "BatchNorm": {
        **_AFFINE,
        "mean": Leaf("running_mean"),
        "var": Leaf("running_var"),
        "count": Leaf("num_batches_tracked", encode=layers.single_count),
    },
}
TORCH = Framework(_read, _write, _runner)
