"""What stands in place of a BatchNorm: hooks that own variables, for Linen and NNX alike."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.core.layer import check_call
from bn_jax.core.running import BatchStats
from bn_jax.surgery.calls import SWAPPED_BATCH_NORMS, Call, attributes, spelled
from bn_jax.surgery.diagnose.modes import MODES
from bn_jax.surgery.norms import Result, Site
from bn_jax.surgery.tree import COLLECTIONS, value

INNER = "surgery_layer"  # the attribute of an NNX layer with the one in its place
_COLLECTION = {"alpha": "params", "count": "batch_stats"}


class AsItWas:
    """The layer as it was: a hook, and what the others are derived from."""

    def __call__(self, call: Call) -> Any:
        """What is returned in place of what the BatchNorm returns."""
        return call.proceed()

    def prepare(self, call: Call) -> None:
        """Makes what an NNX layer needs beside its variables."""


@dataclasses.dataclass(frozen=True)
class Computed(AsItWas):
    """A norm that is a function of a `Site`.

    Attributes:
      name: of the norm, if it has one.
      function: returns y, and the running statistics or None.
      start: what the norm has beside the BatchNorm's variables, and what that starts from.
    """

    name: str
    function: Callable[[Site], Result]
    start: dict[str, float]

    def __call__(self, call: Call) -> Any:
        """What the function returns."""
        making = isinstance(call.layer, nn.Module) and call.layer.is_initializing()
        if making:
            call.proceed()
            for name, v in self._new(call).items():
                call.layer.put_variable(_COLLECTION[name], name, v)
        given = {n: call.kwargs[n] for n in ("scale", "bias") if n in call.kwargs}
        if given:
            check_call(call.layer, **given)
        site = Site(call, _leaves(call) | given, making)
        self._check(site)
        y, stats = self.function(site)
        moves = not (making or call.use_running_average)
        if stats is not None and moves and call.kwargs.get("update_stats", True):
            _write(call, stats)
        return y

    def prepare(self, call: Call) -> None:
        """Makes the norm's own variables."""
        for name, v in self._new(call, _repeats(call)[1]).items():
            setattr(call.layer, name, (nnx.Param if name == "alpha" else nnx.BatchStat)(v))

    def _new(self, call, shape=()):
        """The values of variables that the layer lacks."""
        there, dtype = _leaves(call), getattr(call.layer, "param_dtype", jnp.float32)
        dtypes = {"alpha": dtype, "count": jnp.int32}
        lacking = {name: v for name, v in self.start.items() if name not in there}
        return {name: jnp.full(shape, v, dtypes[name]) for name, v in lacking.items()}

    def _check(self, site):
        """Refuses a layer some of whose variables are missing."""
        layer, wanted = site.call.layer, list(self.start)
        wanted += ["mean", "var"] if self.name in SWAPPED_BATCH_NORMS else []
        wanted += [n for n in ("scale", "bias") if getattr(layer, f"use_{n}", False)]
        if missing := [name for name in wanted if name not in site.leaves]:
            raise ValueError(
                f"{spelled(site.call.path)} has no {' and no '.join(missing)} for {self.name}: "
                "take it from what init of the swapped model returns"
            )


@dataclasses.dataclass(frozen=True)
class Layer(AsItWas):
    """A layer class, or a partial of one, on the variables that the BatchNorm has too."""

    make: Callable[..., Any]

    def __call__(self, call: Call) -> Any:
        """What the layer returns, told the mode and the mask where its call takes them."""
        lent = {}
        if isinstance(call.layer, nnx.Module):
            inner, own = getattr(call.layer, INNER), _stored(call)
            lent = {name: own[name] for name in inner.surgery_lent}
        else:
            if call.layer.is_initializing():
                call.proceed()
            # In a scope whose names are free again: variables that are there are taken.
            inner = self.make(parent=call.layer.scope.rewound())
        takes = inspect.signature(type(inner).__call__).parameters
        inference = call.use_running_average
        told = {
            name: training != inference for name, training in MODES.items() if name in takes
        }
        if "mask" in takes and call.kwargs.get("mask") is not None:
            told["mask"] = call.kwargs["mask"]
        with attributes(inner, **lent):
            y = inner(call.x, **told)
        activation = getattr(call.layer, "activation", None)
        return y if activation is None else activation(y)

    def prepare(self, call: Call) -> None:
        """Makes the layer, with what it has beside the BatchNorm's variables."""
        sizes, repeats = _repeats(call)
        inner = self.make(sizes[0] if len(sizes) == 1 else sizes, rngs=nnx.Rngs(0))
        lent = []
        for name, v in _stored(call).items():
            if not isinstance(own := getattr(inner, name, None), nnx.Variable):
                continue
            if (*repeats, *own.shape) != v.shape:
                raise ValueError(
                    f"{spelled(call.path)} has {name} of shape {v.shape}, and "
                    f"{type(inner).__name__} of shape {own.shape}"
                )
            setattr(inner, name, None)
            lent.append(name)
        inner.surgery_lent = tuple(lent)
        graphdef, state = nnx.split(inner)
        state = jax.tree.map(lambda v: jnp.broadcast_to(v, (*repeats, *v.shape)), state)
        setattr(call.layer, INNER, nnx.merge(graphdef, state))


def _repeats(call):
    """The sizes of an NNX layer's feature axes, and of those before, of a vmap or a scan."""
    shape, axis = _leaves(call)["mean"].shape, call.axis
    axes = 1 if isinstance(axis, int) else len(axis)
    return shape[-axes:], shape[:-axes]


def _stored(call: Call) -> dict[str, Any]:
    """The layer's variables, by our names."""
    if isinstance(call.layer, nnx.Module):
        own = {n: v for n, v in vars(call.layer).items() if isinstance(v, nnx.Variable)}
    else:
        of = [call.layer.variables.get(collection, {}) for collection in COLLECTIONS]
        own = {name: v for leaves in of for name, v in leaves.items()}
    return call.adapted.ours(own)


def _leaves(call: Call) -> dict[str, jax.Array]:
    """The arrays that are the layer's variables, by our names."""
    return {name: value(v) for name, v in _stored(call).items()}


def _write(call: Call, stats: BatchStats) -> None:
    """Keeps running statistics, those that the layer has."""
    layer, stored = call.layer, _stored(call)
    for name, v in stats._asdict().items():
        if name in stored and isinstance(layer, nn.Module):
            (own,) = call.adapted.theirs({name: v})
            layer.put_variable("batch_stats", own, v)
        elif name in stored:
            stored[name].set_value(v)
