"""The BatchNorm layers of a model, found by running it: what each sees, and its statistics.

Layers are named by their path: of module names in Linen, of attributes and indices in NNX,
which is where their statistics are among the variables.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
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


def run(
    model: Model,
    variables: Any,
    *inputs: Any,
    see: Callable[[Call], None],
    inference: Collection[Path] = (),
    **call: Any,
) -> Any:
    """The model's output; nothing that it does to its variables is kept.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with.
      see: is given every call of a BatchNorm, before it.
      inference: paths of layers that use their running statistics, whatever the call says.
    """

    def hook(layer_call):
        see(layer_call)
        return layer_call.proceed(True if layer_call.path in inference else None)

    return apply(intercept(model, variables, hook), variables, *inputs, **call)


def batch_moments(
    model: Model,
    variables: Any,
    *inputs: Any,
    inference: Collection[Path] = (),
    **call: Any,
) -> dict[Path, Moments]:
    """The Moments of what every BatchNorm sees in one batch, in the order of the calls.

    Those of a layer that is called several times are merged. Arguments as for `run`.
    """
    layers: dict[Path, Any] = {}

    def hook(layer_call):
        layers[layer_call.path] = layer_call.layer
        _sow(layer_call.layer, input_moments(layer_call))
        return layer_call.proceed(True if layer_call.path in inference else None)

    _, after = apply_and_update(intercept(model, variables, hook), variables, *inputs, **call)
    return {path: _sown(after, path) for path in layers}


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

    def see(layer_call):
        paths[layer_call.path] = None

    def trace(variables, inputs):
        return run(model, variables, *inputs, see=see, **call)

    jax.eval_shape(trace, variables, inputs)
    return list(paths)


def get_stats(variables: Any, path: Path) -> dict[str, jax.Array]:
    """The running statistics of the layer at `path`: mean, var and perhaps count."""
    if isinstance(variables, nnx.State):
        leaf = nnx.to_flat_state(variables)
        return {p[-1]: v[...] for p, v in leaf if p[:-1] == path and type(v) is nnx.BatchStat}
    stats = variables["batch_stats"]
    for name in path:
        stats = stats[name]
    return dict(stats)


def set_stats(variables: Any, new: dict[Path, dict[str, jax.Array]]) -> Any:
    """The variables with other running statistics, each in the dtype that it had."""
    if isinstance(variables, nnx.State):
        flat = dict(nnx.to_flat_state(variables))
        for path, stats in new.items():
            for name, v in stats.items():
                old = flat[*path, name]
                flat[*path, name] = old.replace(v.astype(old.dtype))
        return nnx.from_flat_state(flat)
    flat = traverse_util.flatten_dict(variables["batch_stats"])
    for path, stats in new.items():
        for name, v in stats.items():
            flat[*path, name] = v.astype(flat[*path, name].dtype)
    return {**variables, "batch_stats": traverse_util.unflatten_dict(flat)}
