"""BatchNorms that stand still in training: three switches, for the layers of a pattern each.

Fine-tuning on small batches wants some of them: normalise as at inference, keep the running
statistics, keep scale and bias. A pattern is a glob over paths, "encoder/*" for instance
(`*` matches "/" too), or a list of such.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, traverse_util

from bn_jax.surgery.calls import BatchNorms, Call, Path, refuse
from bn_jax.surgery.intercept import Model, Variables, intercept, known
from bn_jax.surgery.observe import Pattern, fitting
from bn_jax.surgery.tree import flat, layer_places


def freeze(
    model: Model,
    variables: Variables,
    *,
    normalize: Pattern = (),
    keep: Pattern = (),
    batch_norms: BatchNorms | None = None,
) -> Model:
    """A model with the same variables, some of whose BatchNorms do not do as in training.

    Inference is as before. To unfreeze, go on with the model as it was.

        frozen = freeze(model, variables, normalize="*", keep="*")

    Args:
      model, variables: see `bn_jax.surgery`.
      normalize: the layers that normalise with their running statistics in training too.
        These still move, unless they are kept.
      keep: the layers whose running statistics stay as they are, and with them those of
        layers that share theirs.
      batch_norms: further classes of BatchNorms; see `Adapter`.

    Raises:
      ValueError: a pattern that fits no BatchNorm, or a layer with running statistics of a
        class that is not known; in Linen when that is called.
    """
    fixed, kept = (matching(variables, pattern, model) for pattern in (normalize, keep))
    hook = _Freezing(frozenset(fixed), frozenset(_with_sharing(model, variables, kept)))
    stranger = functools.partial(_refuse_at, hook.fixed | hook.kept)
    return intercept(model, variables, hook, known(batch_norms), stranger=stranger)


@dataclasses.dataclass(frozen=True)
class _Freezing:
    """What is made of the calls of BatchNorms: a hook.

    Attributes:
      fixed: those that normalise with their running statistics.
      kept: those whose running statistics stay.
    """

    fixed: frozenset[Path]
    kept: frozenset[Path]

    def __call__(self, call: Call) -> Any:
        """What the layer returns."""
        if call.use_running_average or call.path not in self.fixed | self.kept:
            return call.proceed()
        if call.path not in self.fixed:
            return _keeping_stats(call)
        y = call.proceed(True)
        if call.path not in self.kept:
            _rewind(call.layer)
            call.proceed()  # for its update
        return y


def _refuse_at(paths: frozenset[Path], path: Path, cls: type) -> None:
    """Raises a ValueError of a layer of an unknown class at one of these paths."""
    if path in paths:
        refuse(path, cls)


def _with_sharing(model, variables, paths):
    """The layers, and those that have some of their running statistics."""
    places = layer_places(model, variables, nnx.BatchStat)
    stored = {place for path in paths for place in places[path].values()}
    return {path for path, names in places.items() if stored & set(names.values())}


def frozen_mask(
    variables: Variables, pattern: Pattern = "*", model: Model | None = None
) -> Any:
    """True for the scale and bias of the BatchNorms of a pattern, False for other parameters.

    For an optimizer that leaves them alone, weight decay included:

        optax.chain(optimizer, optax.masked(optax.set_to_zero(), frozen_mask(variables)))

    Args:
      variables: with parameters and running statistics; of a Linen model or an nnx.State.
      pattern: the layers.
      model: a GraphDef whose layers have Variables in common, which a State has once.

    Returns:
      A tree of bools, of the structure of `params`, or of the State's parameters as
      `nnx.Optimizer` sees them.

    Raises:
      ValueError: a pattern that fits no BatchNorm.
    """
    return _mask(variables, _params(variables, matching(variables, pattern, model), model))


def decay_mask(variables: Variables, model: Model | None = None) -> Any:
    """False for BatchNorms' scale and bias and for every other bias, True for the rest.

    What weight decay should shrink: `optax.adamw(rate, mask=decay_mask(variables))`. Of a
    kernel that a BatchNorm follows it changes the rate of learning (van Laarhoven 2017); of
    scale it changes the function.

    Args, Returns: as in `frozen_mask`.
    """
    ours = _params(variables, norm_paths(variables, model), model)
    others = {p for p in flat(variables, nnx.Param) if p not in ours and p[-1] != "bias"}
    return _mask(variables, others)


def matching(variables: Variables, pattern: Pattern, model: Model | None = None) -> set[Path]:
    """The layers with running statistics whose path fits.

    Args:
      variables, pattern, model: as in `frozen_mask`.

    Raises:
      ValueError: one of several patterns fits none.
    """
    return fitting(norm_paths(variables, model), pattern)


def norm_paths(variables: Variables, model: Model | None = None) -> list[Path]:
    """The layers that have running statistics."""
    places = layer_places(model, variables, nnx.BatchStat)
    # Flax's SpectralNorm has those of other layers, "kernel/u".
    return [p for p, names in places.items() if any("/" not in str(n) for n in names)]


def _params(variables, norms, model):
    """Where the parameters of these layers are."""
    places = layer_places(model, variables, nnx.Param)
    return {place for path in norms for place in places.get(path, {}).values()}


def _mask(variables, chosen):
    if isinstance(variables, nnx.State):
        params = nnx.to_flat_state(nnx.filter_state(variables, nnx.Param))
        return nnx.from_flat_state([(p, p in chosen) for p, _ in params])
    return traverse_util.path_aware_map(
        lambda path, _: path in chosen, variables.get("params", {})
    )


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
    if isinstance(layer, nn.Module) and layer.scope is not None:
        object.__setattr__(layer, "scope", layer.scope.rewound())
