"""The layers of a Flax model that have variables, in the order of their first calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.core.running import ema
from bn_jax.surgery import calls, intercept
from bn_jax.surgery.calls import Adapter, BatchNorms, Call, Hook, Path, spelled
from bn_jax.surgery.convert.layers import (
    Arrays,
    Codec,
    Layer,
    Leaf,
    Settings,
    transposed,
    window,
)
from bn_jax.surgery.intercept import Model
from bn_jax.surgery.kernels import CONV, DENSE, GENERAL, TRANSPOSED
from bn_jax.surgery.tree import by_layer, set_stored

KINDS = {
    "Dense": DENSE + GENERAL,
    "Conv": CONV,
    "ConvTranspose": TRANSPOSED,
    "Embed": (nn.Embed, nnx.Embed),
    "LayerNorm": (nn.LayerNorm, nnx.LayerNorm),
    "GroupNorm": (nn.GroupNorm, nnx.GroupNorm),
}
AS_IS: Codec = {n: Leaf(n) for n in ("kernel", "embedding", "scale", "bias")}


def read(
    model: Model, variables: Any, inputs: Any, call: Mapping[str, Any], norms: BatchNorms
) -> list[Layer]:
    """The layers that a call uses, then, of no kind, what else has variables.

    Args:
      model, variables: see `bn_jax.surgery`.
      inputs, call: what the model is called with; of the inputs only shapes matter.
      norms: classes of BatchNorms.
    """
    own = by_layer(variables, nnx.Variable)
    found: dict[Path, Layer] = {}

    def hook(one):
        y = one.proceed()
        if stored := own.get(one.path):
            found.setdefault(one.path, _layer(one, stored))
        return y

    watched = watch(model, variables, hook, norms)
    jax.eval_shape(lambda v, x: intercept.apply(watched, v, *x, **call), variables, inputs)
    others = {p: stored for p, stored in by_layer(variables).items() if p not in found}
    return [*found.values(), *(Layer("/".join(map(str, p)), v) for p, v in others.items())]


def watch(model: Model, variables: Any, hook: Hook, norms: BatchNorms) -> Model:
    """The model, whose layers of all kinds return what `hook` returns."""
    return intercept.intercept(model, variables, hook, norms, others=sum(KINDS.values(), ()))


def run(model: Model, call: Mapping[str, Any]) -> Callable[[Any, tuple[Any, ...]], Any]:
    """(variables, inputs) -> what the model returns at inference, compiled."""

    def output(variables, inputs):
        one = intercept.evaluation(model, variables, *inputs, **call)
        return one(model, variables, *inputs, **call)[0]

    return jax.jit(output)


def write(variables: Any, new: dict[str, Arrays]) -> Any:
    """The variables with other arrays in the layers of these names."""
    paths = {spelled(path): path for path in by_layer(variables, nnx.Variable)}
    values = {(*paths[at], name): v for at, leaves in new.items() for name, v in leaves.items()}
    return set_stored(variables, values)


def batch_norm_settings(module: Any, adapter: Adapter) -> Settings:
    """The settings of a BatchNorm; of other people's classes the epsilon alone."""
    if not isinstance(module, calls.BATCH_NORMS):
        return Settings(epsilon=adapter.read(module, "epsilon"))
    variants = calls.GHOSTS + calls.RENORMS
    variant = [c.__name__ for c in variants if isinstance(module, c)]
    return Settings(
        layer=variant[0] if variant else "BatchNorm",
        estimator=getattr(module, "estimator", ema),
        momentum=module.momentum,
        epsilon=module.epsilon,
        unbiased=getattr(module, "unbiased", False),
    )


def _layer(one: Call, stored: Arrays) -> Layer:
    module, name, x = one.layer, spelled(one.path), one.x.shape
    if one.adapter:
        leaves = {n: Leaf(getattr(one.adapter, n)) for n in ("scale", "bias", "mean", "var")}
        codecs = {"BatchNorm": leaves | {"count": Leaf("count")}}
        return Layer(name, stored, codecs, batch_norm_settings(module, one.adapter), x)
    kind = next(kind for kind, classes in KINDS.items() if isinstance(module, classes))
    codec, features = AS_IS, ()
    if kind == "Dense":
        inputs = _contracted(module)
        features = stored["kernel"].shape[inputs:]
        rows = Leaf("kernel", lambda v: v.reshape(math.prod(v.shape[:inputs]), -1))
        codec = AS_IS | {"kernel": rows, "bias": Leaf("bias", jnp.ravel)}
    elif kind == "ConvTranspose" and module.transpose_kernel:
        codec = AS_IS | {"kernel": Leaf("kernel", transposed, transposed)}
    return Layer(name, stored, {kind: codec}, _settings(kind, module), x, features)


def _contracted(module):
    """How many axes of its kernel a Dense contracts."""
    if getattr(module, "batch_dims", ()) or getattr(module, "batch_axis", {}):
        raise ValueError(f"cannot convert {module}: it has a kernel for every batch axis")
    axis = getattr(module, "axis", -1)
    return len(axis) if isinstance(axis, Sequence) else 1


def _settings(kind, module) -> Settings:
    if not kind.startswith("Conv"):
        groups = getattr(module, "num_groups", None) or None
        return Settings(epsilon=getattr(module, "epsilon", None), num_groups=groups)
    size, groups = module.kernel_size, getattr(module, "feature_group_count", 1)
    rank = len(size) if isinstance(size, Sequence) else 1
    known = module.strides, module.kernel_dilation, module.padding
    return window(rank, *known, feature_group_count=groups)
