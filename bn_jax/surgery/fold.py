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
from flax import nnx

from bn_jax.core.arrays import widen
from bn_jax.surgery import kernels
from bn_jax.surgery.flow import LINEAR, Flow, trace
from bn_jax.surgery.intercept import (
    BATCH_NORMS,
    Call,
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

    model: nn.Module | nnx.GraphDef
    variables: Any
    pairs: list[Pair]
    refused: dict[Path, str]
    difference: float


def fold(
    model: nn.Module | nnx.GraphDef,
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
    reasons = []
    for side, found in (("before", flow.before[norm]), ("after", flow.after[norm])):
        if isinstance(found, str):
            reasons.append(found)
            continue
        kernel = get_leaves(variables, found)["kernel"]
        reason = kernels.refusal(flow.calls[found], call, side, kernel.shape)
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
            return activation(call.x).astype(flow.dtypes[call.path])
        if call.path in new:
            with attributes(call.layer, use_bias=True):
                return call.proceed()
        return call.proceed()

    changed = intercept(model, variables, hook, LINEAR + BATCH_NORMS)
    return replace_leaves(changed, variables, new, absorbed)


def _affine(call: Call, leaves: dict[str, jax.Array]) -> list[jax.Array]:
    """a and c, of the rank of what the BatchNorm takes."""
    a = jax.lax.rsqrt(leaves["var"] + call.layer.epsilon) * leaves.get("scale", 1)
    c = leaves.get("bias", 0) - a * leaves["mean"]
    return widen(call.x, call.layer.axis, a=a, c=c)


def _difference(old: Any, new: Any) -> float:
    def one(a, b):
        largest = jnp.max(jnp.abs(a))
        return jnp.max(jnp.abs(a - b)) / jnp.where(largest > 0, largest, 1)

    differences = jax.tree.leaves(jax.tree.map(one, old, new))
    return float(jnp.max(jnp.stack(differences)))
