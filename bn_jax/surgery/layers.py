"""The BatchNorm layers of a model, found by running it, and what each sees.

Layers are named by their path: of module names in Linen, of attributes and indices in NNX,
which is where their variables are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from bn_jax.core.moments import Moments, merge, moments
from bn_jax.surgery.intercept import (
    SOWN,
    Call,
    Model,
    Path,
    apply,
    apply_and_update,
    intercept,
    spelled,
)


def batch_moments(
    model: Model,
    variables: Any,
    *inputs: Any,
    inference: Collection[Path] = (),
    **call: Any,
) -> dict[Path, Moments]:
    """The Moments of what every BatchNorm sees in one batch, in the order of the calls.

    Those of a layer that is called several times are merged.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with.
      inference: paths of layers that use their running statistics, whatever the call says.
    """
    layers: dict[Path, Any] = {}

    def hook(layer_call):
        layers[layer_call.path] = layer_call.layer
        _sow(layer_call.layer, input_moments(layer_call))
        return layer_call.proceed(True if layer_call.path in inference else None)

    _, after = apply_and_update(intercept(model, variables, hook), variables, *inputs, **call)
    return {path: _per_step(_sown(after, path)) for path in layers}


def _sow(layer, new):
    """Leaves the Moments among the variables, which come out of `nn.remat` and the like."""

    def merged(old, new):
        return new if old is None else merge(old, new)

    if isinstance(layer, nn.Module):
        layer.sow(SOWN, "moments", new, init_fn=lambda: None, reduce_fn=merged)
    else:
        old = getattr(layer, "sown_moments", None)
        layer.sown_moments = nnx.Intermediate(merged(old and old.get_value(), new))


def _sown(variables, path):
    try:
        if isinstance(variables, nnx.State):
            return dict(nnx.to_flat_state(variables))[*path, "sown_moments"].get_value()
        return traverse_util.flatten_dict(variables[SOWN])[*path, "moments"]
    except KeyError:
        raise ValueError(
            f"{spelled(path)} is within a scan or the like, which statistics do not come out of"
        ) from None


def _per_step(m):
    """Of a layer within a scan that has statistics of every step: a count beside each mean."""
    if not 0 < m.count.ndim < m.mean.ndim:
        return m
    rest = (1,) * (m.mean.ndim - m.count.ndim)
    return m._replace(
        count=jnp.broadcast_to(m.count.reshape(*m.count.shape, *rest), m.mean.shape)
    )


def input_moments(call: Call) -> Moments:
    """The Moments of the input of one call of a BatchNorm, over its replicas too."""
    layer = call.layer
    return moments(
        call.x, axis=layer.axis, mask=call.kwargs.get("mask"), axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
    )  # fmt: skip


def layer_paths(model: Model, variables: Any, *inputs: Any, **call: Any) -> list[Path]:
    """The BatchNorm layers that a call uses, in the order of their first use."""
    paths: dict[Path, None] = {}

    def hook(layer_call):
        paths[layer_call.path] = None
        return layer_call.proceed()

    seen = intercept(model, variables, hook)
    jax.eval_shape(lambda v, x: apply(seen, v, *x, **call), variables, inputs)
    return list(paths)
