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

import bn_jax.linen
import bn_jax.nnx
from bn_jax.core.moments import Moments, merge, moments

Path = tuple[str | int, ...]
LINEN = (nn.BatchNorm, bn_jax.linen.BatchNorm)
NNX = (nnx.BatchNorm, bn_jax.nnx.BatchNorm)


def run(
    model: nn.Module | nnx.GraphDef,
    variables: Any,
    *inputs: Any,
    see: Callable[[Path, Any, jax.Array, Any], None],
    inference: Collection[Path] = (),
    **call: Any,
) -> Any:
    """The model's output; nothing that it does to its variables is kept.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with.
      see: called with the path, the layer, its input and its mask before every call of a
        BatchNorm.
      inference: paths of layers that use their running statistics, whatever the call says.
    """
    if isinstance(model, nn.Module):
        return _run_linen(model, variables, inputs, call, see, inference)
    return _run_nnx(model, variables, inputs, call, see, inference)


def batch_moments(
    model: nn.Module | nnx.GraphDef,
    variables: Any,
    *inputs: Any,
    inference: Collection[Path] = (),
    **call: Any,
) -> dict[Path, Moments]:
    """The Moments of what every BatchNorm sees in one batch, in the order of the calls.

    Those of a layer that is called several times are merged. Arguments as for `run`.
    """
    found: dict[Path, Moments] = {}

    def see(path, layer, x, mask):
        seen = moments(
            x, axis=layer.axis, mask=mask, axis_name=layer.axis_name,
            axis_index_groups=layer.axis_index_groups,
        )  # fmt: skip
        found[path] = merge(found[path], seen) if path in found else seen

    run(model, variables, *inputs, see=see, inference=inference, **call)
    return found


def layer_paths(
    model: nn.Module | nnx.GraphDef, variables: Any, *inputs: Any, **call: Any
) -> list[Path]:
    """The BatchNorm layers that a call uses, in the order of their first use."""
    paths: dict[Path, None] = {}

    def see(path, *_):
        paths[path] = None

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


def _run_linen(model, variables, inputs, call, see, inference):
    def intercept(next_fun, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, LINEN) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        see(layer.path, layer, args[0], kwargs.get("mask"))
        if layer.path in inference:
            # It may be said in the constructor or in the call, and must not be in both.
            object.__setattr__(layer, "use_running_average", True)
            args = args[:1]
            kwargs = {k: v for k, v in kwargs.items() if k != "use_running_average"}
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
        mutable = [name for name in variables if name != "params"]
        return model.apply(variables, *inputs, mutable=mutable, **call)[0]


def _run_nnx(model, variables, inputs, call, see, inference):
    module = nnx.merge(model, variables, copy=True)
    layers = [(p, m) for p, m in nnx.iter_modules(module) if isinstance(m, NNX)]
    for path, layer in layers:
        watched = _Watched(layer, path, see, path in inference)
        if not path:
            module = watched
            break
        parent = module
        for name in path[:-1]:
            parent = _child(parent, name)
        if isinstance(parent, nnx.List | nnx.Dict):
            parent[path[-1]] = watched
        else:
            setattr(parent, path[-1], watched)
    return module(*inputs, **call)


def _child(parent, name):
    return (
        parent[name]
        if isinstance(name, int) or isinstance(parent, dict)
        else getattr(parent, name)
    )


class _Watched(nnx.Module):
    """An NNX BatchNorm that calls `see` first."""

    def __init__(self, layer, path, see, inference):
        self.layer, self.path, self.see, self.inference = layer, path, see, inference

    def __call__(self, x, use_running_average=None, **kwargs):
        self.see(self.path, self.layer, x, kwargs.get("mask"))
        mode = True if self.inference else use_running_average
        return self.layer(x, mode, **kwargs)
