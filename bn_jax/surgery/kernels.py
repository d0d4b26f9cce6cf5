"""A BatchNorm as an affine map, and how the kernels of Flax's linear layers absorb it."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.core.arrays import feature_shape, inverse_std, split_axes, widen
from bn_jax.surgery import compare
from bn_jax.surgery.calls import Call
from bn_jax.surgery.tree import Leaves

DENSE = (nn.Dense, nnx.Linear)
GENERAL = (nn.DenseGeneral, nnx.LinearGeneral)
CONV = (nn.Conv, nnx.Conv)
TRANSPOSED = (nn.ConvTranspose, nnx.ConvTranspose)
LINEAR = DENSE + GENERAL + CONV + TRANSPOSED
# At the border of an image these put no constant in: what the inputs have in common stays so.
PADS_NOTHING = ("VALID", "CIRCULAR", "REFLECT")


def factors(call: Call, leaves: Leaves) -> list[jax.Array]:
    """a and c, of the rank of what the BatchNorm takes."""
    var = leaves["var"]
    if not isinstance(call.layer, nn.BatchNorm):
        # In float64 where the layer is; Flax's in Linen computes in the statistics' dtype.
        var = var.astype(jnp.promote_types(call.x.dtype, var.dtype))
    a = inverse_std(var, call.epsilon) * leaves.get("scale", 1)
    c = leaves.get("bias", 0) - a * leaves["mean"]
    return widen(call.x, call.axis, a=a, c=c)


def not_affine(call: Call, leaves: Leaves) -> str | None:
    """Why the BatchNorm is no affine map of finite numbers in this call, if so."""
    if not call.use_running_average:
        return "it normalises with the statistics of the batch in this call"
    given = [name for name in ("scale", "bias") if call.kwargs.get(name) is not None]
    if given:
        return f"its {' and '.join(given)} come with the call"
    if missing := {"mean", "var"} - leaves.keys():
        return f"it has no {' and no '.join(sorted(missing))}: say Adapter(mean=..., var=...)"
    if leaves["var"].shape != feature_shape(call.x.shape, call.axis):
        return "its statistics are of several layers: it is repeated by a vmap or a scan"
    for name, v in leaves.items():
        if bad := compare.nonfinite(v):
            return f"{bad} of {v.size} values of its {name} are not finite"
    if bad := compare.nonfinite(factors(call, leaves)[0]):
        var, epsilon = leaves["var"], float(call.epsilon)
        return (
            f"{bad} of {var.size} features have no finite factor: its var is "
            f"{float(var.min()):.3g} at least, with epsilon={epsilon:g}"
        )
    return None


def refusal(layer: Call, norm: Call, side: str, leaves: Leaves) -> str | None:
    """Why the layer cannot absorb the BatchNorm before or after which it stands, if so.

    Args:
      layer, norm: their calls.
      side: "before" if the layer is before the BatchNorm, "after" if it is after it.
      leaves: its parameters.
    """
    module = layer.layer
    if "kernel" not in leaves:
        return "has no kernel of its own"
    kernel = leaves["kernel"].shape
    if isinstance(module, GENERAL) and _batched(module):
        return "has batch axes"
    if len(kernel) != _rank(module):
        return f"has a kernel of shape {kernel}: it is repeated by a vmap or a scan"
    if side == "after" and getattr(norm.layer, "activation", None) is not None:
        return "would have to come before the BatchNorm's activation"
    _, reduced = split_axes(norm.x.shape, norm.axis)
    kept = set(range(len(norm.x.shape))) - set(reduced)
    if not kept <= set(_feature_axes(layer, norm, side)):
        return f"does not have the BatchNorm's axis {norm.axis} for its features"
    return _refused_inputs(module, kernel) if side == "after" else None


def _refused_inputs(module, kernel):
    if isinstance(module, TRANSPOSED):
        return "is transposed: at the border it sums fewer inputs"
    if not isinstance(module, CONV):
        return None
    if module.mask is not None:
        return "has a mask"
    dilation = module.input_dilation
    if dilation is not None and math.prod(jnp.atleast_1d(jnp.asarray(dilation)).tolist()) != 1:
        return "has zeros between its inputs"
    padding = module.padding
    if (padding == "SAME" and math.prod(kernel[:-2]) == 1) or padding in PADS_NOTHING:
        return None
    if not isinstance(padding, str) and not any(jax.tree.leaves(padding)):
        return None
    return f"pads with zeros, which the BatchNorm would not have normalised: {padding}"


def absorb(layer: Call, leaves: Leaves, a: jax.Array, c: jax.Array, side: str) -> Leaves:
    """Kernel and bias with y = a x + c in them.

    Args:
      layer: a call of it.
      leaves: kernel, and bias if it has one.
      a, c: of the rank of what is scaled and shifted.
      side: as in `refusal`.
    """
    module, kernel = layer.layer, leaves["kernel"]
    outputs = _outputs(module, kernel.shape)
    bias = leaves.get("bias", jnp.zeros(outputs, kernel.dtype))
    new_kernel, new_bias = _absorbed(layer, kernel, bias, a, c, side)
    return {"kernel": new_kernel.astype(kernel.dtype), "bias": new_bias.astype(bias.dtype)}


def _absorbed(layer, kernel, bias, a, c, side):
    module = layer.layer
    if side == "before":
        a, c = (v.reshape(v.shape[v.ndim - bias.ndim :]) for v in (a, c))
        over_outputs = a[:, None] if getattr(module, "transpose_kernel", False) else a
        return kernel * _ranked(over_outputs, kernel.ndim), bias * a + c
    a, c = (_ranked(_over_inputs(module, layer, kernel.shape, v), kernel.ndim) for v in (a, c))
    return kernel * a, bias + jnp.sum(kernel * c, axis=tuple(range(kernel.ndim - bias.ndim)))


def _over_inputs(module, layer, kernel, v):
    """A value per input, so that it broadcasts against the kernel."""
    if isinstance(module, GENERAL):
        ndim = len(layer.x.shape)
        axes = sorted(a % ndim for a in _tuple(module.axis))  # as Flax does
        others = [a for a in range(ndim) if a not in axes]
        v = jnp.transpose(v, others + axes)
        return v.reshape(v.shape[len(others) :] + (1,) * (len(kernel) - len(axes)))
    v = v.reshape(-1)
    groups = module.feature_group_count if isinstance(module, CONV) else 1
    return jnp.repeat(v.reshape(groups, -1).T, kernel[-1] // groups, axis=1)


def _ranked(v, ndim):
    return v.reshape((1,) * (ndim - v.ndim) + v.shape)


def _feature_axes(layer, norm, side):
    """The axes, of what the BatchNorm takes, that the layer's features are."""
    ndim = len(norm.x.shape)
    if isinstance(layer.layer, GENERAL):
        if side == "after":
            return [a % ndim for a in _tuple(layer.layer.axis)]
        return range(ndim - len(_features(layer.layer)), ndim)
    return [ndim - 1]


def _outputs(module, kernel):
    if isinstance(module, GENERAL):
        return kernel[len(_tuple(module.axis)) :]
    return kernel[-2:-1] if getattr(module, "transpose_kernel", False) else kernel[-1:]


def _rank(module):
    if isinstance(module, DENSE):
        return 2
    if isinstance(module, GENERAL):
        return len(_tuple(module.axis)) + len(_features(module))
    return len(_tuple(module.kernel_size)) + 2


def _batched(module):
    return module.batch_dims if isinstance(module, nn.DenseGeneral) else module.batch_axis


def _features(module):
    named = module.features if isinstance(module, nn.DenseGeneral) else module.out_features
    return _tuple(named)


def _tuple(v):
    return (v,) if isinstance(v, int) else tuple(v)
