"""A BatchNorm at inference is an affine map: it goes into the linear layer next to it.

With a = scale / sqrt(var + epsilon) and c = bias - a mean per feature, y = a x + c. Before
it stands a layer with kernel W and bias b, whose outputs it scales (Jacob et al. 2018,
section 3.2):

    W' = a W (over the output features)        b' = a b + c

or after it, whose inputs it scales:

    W' = W a (over the input features)         b' = b + W c
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.core.arrays import feature_shape, widen
from bn_jax.surgery import kernels
from bn_jax.surgery.flow import Flow, trace
from bn_jax.surgery.intercept import (
    BATCH_NORMS,
    Call,
    Model,
    Path,
    apply,
    attributes,
    intercept,
    spelled,
)
from bn_jax.surgery.tree import get_leaves, replace_leaves


class Pair(NamedTuple):
    """A BatchNorm and the linear layer that has absorbed it, which was before or after it."""

    norm: Path
    layer: Path
    side: str


class Folded(NamedTuple):
    """What `fold` returns.

    Attributes:
      model: as the one given, without the BatchNorms that are folded.
      variables: for that model.
      pairs: what was folded into what, in the order of the calls.
      refused: of every other BatchNorm the reason.
      difference: the largest difference of the two models' outputs on the sample, in terms
        of the largest absolute output.
    """

    model: Model
    variables: Any
    pairs: list[Pair]
    refused: dict[Path, str]
    difference: float


def fold(
    model: Model,
    variables: Any,
    *inputs: Any,
    tolerance: float = 1e-3,
    **call: Any,
) -> Folded:
    """Absorbs every BatchNorm that can be into the linear layer before it, or after it.

    Which layers are next to each other is read off what the model does with the sample.
    Linear layers are Flax's Dense, DenseGeneral, Conv (grouped and depthwise too) and
    ConvTranspose, in NNX Linear, LinearGeneral, Conv and ConvTranspose. A layer that had no
    bias gets one. An activation within a BatchNorm of ours stays.

        folded = fold(model, variables, images, train=False)
        logits = folded.model.apply(folded.variables, images, train=False)

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs: a sample: what the model is called with at inference.
      tolerance: the largest `difference` to put up with. In bfloat16 outputs differ by 1e-2.
      **call: what puts the model into inference mode, `train=False` for instance.

    Raises:
      ValueError: the outputs differ by more than that.
    """
    flow = trace(model, variables, *inputs, **call)
    pairs, refused = [], {}
    for path in flow.before:
        pair = _pair(flow, variables, path)
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            refused[path] = pair
    new, folded = _without(model, variables, flow, pairs)
    difference = _difference(
        apply(model, variables, *inputs, **call), apply(new, folded, *inputs, **call)
    )
    if not difference <= tolerance:
        raise ValueError(
            f"folding changed the output by {difference:.2g} of its largest value, more than "
            f"tolerance={tolerance:g}: is a kernel used in two places, or the model in half "
            "precision?"
        )
    return Folded(new, folded, pairs, refused, difference)


def _pair(flow: Flow, variables: Any, norm: Path) -> Pair | str:
    """With which layer the BatchNorm goes, or why with none."""
    call = flow.calls[norm]
    if not call.use_running_average:
        return "it normalises with the statistics of the batch in this call"
    given = [name for name in ("scale", "bias") if call.kwargs.get(name) is not None]
    if given:
        return f"its {' and '.join(given)} come with the call"
    if get_leaves(variables, norm)["var"].shape != feature_shape(call.x.shape, call.layer.axis):
        return "its statistics are of several layers: it is repeated by a vmap or a scan"
    reasons = []
    for side, found in (("before", flow.before[norm]), ("after", flow.after[norm])):
        if isinstance(found, str):
            reasons.append(found)
            continue
        reason = kernels.refusal(flow.calls[found], call, side, get_leaves(variables, found))
        if reason is None:
            return Pair(norm, found, side)
        reasons.append(f"{spelled(found)} {reason}")
    return "; ".join(dict.fromkeys(reasons))


def _without(model, variables, flow, pairs):
    """The model and the variables without the BatchNorms of the pairs."""
    absorbed = {pair.norm for pair in pairs}
    new = {pair.layer: get_leaves(variables, pair.layer) for pair in pairs}
    for norm, layer, side in pairs:
        a, c = _affine(flow.calls[norm], get_leaves(variables, norm))
        new[layer] = kernels.absorb(flow.calls[layer], new[layer], a, c, side)

    def hook(call: Call):
        if call.path in absorbed:
            activation = getattr(call.layer, "activation", None) or (lambda x: x)
            return activation(call.x).astype(flow.outputs[call.path].dtype)
        if call.path in new:
            with attributes(call.layer, use_bias=True):
                return call.proceed()
        return call.proceed()

    changed = intercept(model, variables, hook, kernels.LINEAR + BATCH_NORMS)
    return replace_leaves(changed, variables, new, absorbed)


def _affine(call: Call, leaves: dict[str, jax.Array]) -> list[jax.Array]:
    """a and c, of the rank of what the BatchNorm takes."""
    var = leaves["var"]
    if not isinstance(call.layer, nn.BatchNorm):
        # In float64 where the layer is; Flax's in Linen computes in the statistics' dtype.
        var = var.astype(jnp.promote_types(call.x.dtype, var.dtype))
    a = jax.lax.rsqrt(var + call.layer.epsilon) * leaves.get("scale", 1)
    c = leaves.get("bias", 0) - a * leaves["mean"]
    return widen(call.x, call.layer.axis, a=a, c=c)


def _difference(old: Any, new: Any) -> float:
    """Of the largest finite output; equal infinities, and NaN in both, do not differ."""

    def one(a, b):
        a, b = (np.asarray(v, np.result_type(np.asarray(v), np.float64)) for v in (a, b))
        largest = np.abs(a[np.isfinite(a)]).max(initial=0)
        unlike = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        return np.abs(a[unlike] - b[unlike]).max(initial=0) / (largest or 1)

    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return float(max((one(a, b) for a, b in pairs), default=0))
