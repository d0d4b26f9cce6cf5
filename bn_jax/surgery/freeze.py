"""BatchNorms that stand still in training: three switches, for the layers of a pattern each.

Fine-tuning on small batches wants some of them: normalise as at inference, keep the running
statistics, keep scale and bias. A pattern is a glob over paths, "encoder/*" for instance
(`*` matches "/" too), or a list of such.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, traverse_util

from bn_jax.surgery.intercept import Call, Model, Path, intercept, spelled
from bn_jax.surgery.tree import flat

Pattern = str | Sequence[str]


def freeze(
    model: Model,
    variables: Any,
    *,
    normalize: Pattern = (),
    keep: Pattern = (),
) -> Model:
    """A model with the same variables, some of whose BatchNorms do not do as in training.

    Inference is as before. To unfreeze, go on with the model as it was.

        frozen = freeze(model, variables, normalize="*", keep="*")

    Args:
      model, variables: see `bn_jax.surgery`.
      normalize: the layers that normalise with their running statistics in training too.
        These still move, unless they are kept.
      keep: the layers whose running statistics stay as they are.

    Raises:
      ValueError: a pattern that fits no BatchNorm.
    """
    fixed, kept = matching(variables, normalize), matching(variables, keep)

    def hook(call: Call):
        if call.use_running_average or call.path not in fixed | kept:
            return call.proceed()
        if call.path not in fixed:
            return _keeping_stats(call)
        y = call.proceed(True)
        if call.path not in kept:
            _rewind(call.layer)
            call.proceed()  # for its update
        return y

    return intercept(model, variables, hook)


def frozen_mask(variables: Any, pattern: Pattern = "*") -> Any:
    """True for the scale and bias of the BatchNorms of a pattern, False for other parameters.

    For an optimizer that leaves them alone, weight decay included:

        optax.chain(optimizer, optax.masked(optax.set_to_zero(), frozen_mask(variables)))

    Args:
      variables: with parameters and running statistics; of a Linen model or an nnx.State.
      pattern: the layers.

    Returns:
      A tree of bools, of the structure of `params`, or of the State's parameters as
      `nnx.Optimizer` sees them.

    Raises:
      ValueError: a pattern that fits no BatchNorm.
    """
    frozen = matching(variables, pattern)
    return _mask(variables, lambda path: path[:-1] in frozen)


def decay_mask(variables: Any) -> Any:
    """False for BatchNorms' scale and bias and for every other bias, True for the rest.

    What weight decay should shrink: `optax.adamw(rate, mask=decay_mask(variables))`. Of a
    kernel that a BatchNorm follows it changes the rate of learning (van Laarhoven 2017); of
    scale it changes the function.

    Args, Returns: as in `frozen_mask`.
    """
    norms = norm_paths(variables)
    return _mask(variables, lambda path: path[:-1] not in norms and path[-1] != "bias")


def matching(variables: Any, pattern: Pattern) -> set[Path]:
    """The BatchNorms whose path fits.

    Raises:
      ValueError: one of several patterns fits none.
    """
    norms, found = norm_paths(variables), set()
    for glob in [pattern] if isinstance(pattern, str) else pattern:
        fitting = {p for p in norms if fnmatch.fnmatchcase(spelled(p), glob)}
        if not fitting:
            names = ", ".join(map(spelled, norms)) or "none"
            raise ValueError(f"no BatchNorm fits {glob!r}: there are {names}")
        found |= fitting
    return found


def norm_paths(variables: Any) -> list[Path]:
    """The layers that have a running mean and variance."""
    leaves = flat(variables, nnx.BatchStat)
    return [p[:-1] for p in leaves if p[-1] == "mean" and (*p[:-1], "var") in leaves]


def _mask(variables, wanted):
    if isinstance(variables, nnx.State):
        params = nnx.to_flat_state(nnx.filter_state(variables, nnx.Param))
        return nnx.from_flat_state([(p, wanted(p)) for p, _ in params])
    return traverse_util.path_aware_map(lambda path, _: wanted(path), variables["params"])


def _keeping_stats(call: Call) -> jax.Array:
    """What the layer returns; its statistics are put back."""
    layer = call.layer
    if isinstance(layer, nnx.Module):
        stats = [v for v in vars(layer).values() if type(v) is nnx.BatchStat]
        before = [v[...] for v in stats]
        y = call.proceed()
        for v, value in zip(stats, before, strict=True):
            v.set_value(value)
        return y
    before = dict(layer.variables.get("batch_stats", {}))
    y = call.proceed()
    if layer.is_mutable_collection("batch_stats"):
        for name, value in before.items():
            layer.put_variable("batch_stats", name, value)
    return y


def _rewind(layer):
    """Lets a Linen module be called again, as Flax does at the end of a call of its own."""
    if isinstance(layer, nn.Module):
        object.__setattr__(layer, "scope", layer.scope.rewound())
