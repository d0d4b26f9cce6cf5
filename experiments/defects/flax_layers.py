"""Flax's two BatchNorm layers behind one face, and bn_jax's drop-ins for them.

The adapters of `peers.py` have the same face: `train` and `restored`, and
what not every package offers only where it does (`as_mask`, `replicas`, `evaluate`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

EPSILON = 1e-5  # of all, so that Keras' default of 1e-3 makes no difference


class Trained(NamedTuple):
    """What training on some batches leaves.

    Attributes:
      y: the output for the last batch.
      mean, var: running statistics `[features]` as evaluation reads them.
    """

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray


class Linen:
    """`flax.linen.BatchNorm` and its drop-in."""

    def __init__(self, package: str):
        self.package, self._module = package, f"{package}.linen"

    def as_mask(self, mask: np.ndarray, axis: int = -1) -> np.ndarray:
        """A mask without the feature axis, of the shape that the layer takes."""
        return np.expand_dims(mask, axis)

    def _layer(self, **fields):
        return importlib.import_module(self._module).BatchNorm(epsilon=EPSILON, **fields)

    def train(self, batches: Sequence[Any], masks: Sequence[Any] = (), **fields) -> Trained:
        """Training steps on the batches in turn; `masks` of the rank of the batches."""

        layer = self._layer(**fields)
        variables, y = _init(layer, batches[0]), None
        step = jax.jit(functools.partial(_apply, layer))
        for x, mask in zip(batches, masks or [None] * len(batches), strict=True):
            y, update = step(variables, x, mask)
            variables = {**variables, **update}
        stats = variables["batch_stats"]
        return Trained(*map(np.asarray, (y, stats["mean"], stats["var"])))

    def restored(self, x: Any, stats: tuple | None) -> np.ndarray:
        """The running mean after a step from these statistics (None: of none at all)."""
        layer = self._layer()
        variables = {"params": _init(layer, x)["params"]}
        if stats is not None:
            variables["batch_stats"] = dict(zip(("mean", "var"), stats, strict=True))
        return np.asarray(_apply(layer, variables, x, None)[1]["batch_stats"]["mean"])

    def replicas(self, x: Any, mask: Any) -> np.ndarray:
        """The mean that each replica keeps of its x[i] and mask[i], momentum being 0."""

        layer = self._layer(momentum=0.0, axis_name="replica")
        variables = _init(layer, x[0])

        def step(x, mask):
            return _apply(layer, variables, x, mask)[1]["batch_stats"]["mean"]

        return np.asarray(jax.vmap(step, axis_name="replica")(x, mask))

    def evaluate(self, x: Any, mean: Any, var: Any, **fields) -> np.ndarray:
        """The output with running statistics of these values."""
        layer = self._layer(**fields)
        variables = {**_init(layer, x), "batch_stats": {"mean": mean, "var": var}}
        return np.asarray(layer.apply(variables, x, use_running_average=True))


def _init(layer, x):

    return layer.init(jax.random.key(0), x, use_running_average=True)


def _apply(layer, variables, x, mask):
    return layer.apply(
        variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
    )


class NNX:
    """`flax.nnx.BatchNorm` and its drop-in."""

    def __init__(self, package: str):
        self.package, self._module = package, f"{package}.nnx"

    def as_mask(self, mask: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.expand_dims(mask, axis)

    def _layer(self, features, **fields):

        layer = importlib.import_module(self._module).BatchNorm
        return layer(features, epsilon=EPSILON, rngs=nnx.Rngs(0), **fields)

    def train(self, batches: Sequence[Any], masks: Sequence[Any] = (), **fields) -> Trained:

        layer = self._layer(batches[0].shape[fields.get("axis", -1)], **fields)
        y = None
        step = nnx.jit(lambda layer, x, mask: layer(x, use_running_average=False, mask=mask))
        for x, mask in zip(batches, masks or [None] * len(batches), strict=True):
            y = step(layer, x, mask)
        return Trained(*map(np.asarray, (y, layer.mean[...], layer.var[...])))

    def restored(self, x: Any, stats: tuple | None) -> np.ndarray:

        graph, params, kept = nnx.split(self._layer(x.shape[-1]), nnx.Param, nnx.BatchStat)
        if stats is None:
            layer = nnx.merge(graph, params)
        else:
            mean, var = map(jnp.asarray, stats)
            nnx.replace_by_pure_dict(kept, {"mean": mean, "var": var})
            layer = nnx.merge(graph, params, kept)
        layer(x, use_running_average=False)
        return np.asarray(layer.mean[...])

    def replicas(self, x: Any, mask: Any) -> np.ndarray:

        def step(x, mask):
            layer = self._layer(x.shape[-1], momentum=0.0, axis_name="replica")
            layer(x, use_running_average=False, mask=mask)
            return layer.mean[...]

        return np.asarray(jax.vmap(step, axis_name="replica")(x, mask))

    def evaluate(self, x: Any, mean: Any, var: Any, **fields) -> np.ndarray:
        layer = self._layer(x.shape[-1], **fields)
        layer.mean[...], layer.var[...] = mean, var
        return np.asarray(layer(x, use_running_average=True))
