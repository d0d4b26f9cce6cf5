"""BatchNorm of other packages behind the face of `flax_layers`, used as each documents.

Nothing is imported before it is used. `FRAMEWORKS` has all adapters by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.defects.flax_layers import EPSILON, NNX, Linen, Trained


class Haiku:
    package = "haiku"

    def _layer(self, momentum=0.99):
        import haiku as hk

        def apply(x):
            layer = hk.BatchNorm(True, True, decay_rate=momentum, eps=EPSILON)
            return layer(x, is_training=True)

        return hk.transform_with_state(apply)

    def train(self, batches: Sequence[Any], **fields) -> Trained:

        layer = self._layer(**fields)
        params, state = layer.init(None, batches[0])
        step = jax.jit(layer.apply)
        y = None
        for x in batches:
            y, state = step(params, state, None, x)
        return Trained(np.asarray(y), *(self._average(state, of) for of in ("mean", "var")))

    def restored(self, x: Any, stats: tuple | None) -> np.ndarray:
        layer = self._layer()
        params, state = layer.init(None, x)
        for of, value in zip(("mean", "var"), stats or (), strict=False):
            # Haiku's have the rank of the input.
            kept = {"hidden": value[None], "average": value[None]}
            name = f"batch_norm/~/{of}_ema"
            state[name] = {**state[name], **kept}
        _, state = layer.apply(params, state if stats else {}, None, x)
        return self._average(state, "mean")

    def _average(self, state, of):
        return np.asarray(state[f"batch_norm/~/{of}_ema"]["average"]).ravel()


class Equinox:
    package = "equinox"

    def _layer(self, features, **fields):
        import equinox as eqx

        # By its own dtype in 64-bit mode the statistics would be float64 from the start.
        return eqx.nn.BatchNorm(
            features, "batch", eps=EPSILON, mode="batch", dtype=jnp.float32, **fields
        )

    def train(self, batches: Sequence[Any], **fields) -> Trained:
        import equinox as eqx

        layer = self._layer(batches[0].shape[-1], **fields)
        state = eqx.nn.State(layer)
        step = eqx.filter_jit(_over_batch)
        y = None
        for x in batches:
            y, state = step(layer, x, state)
        return Trained(np.asarray(y), *self._read(layer, state))

    def restored(self, x: Any, stats: tuple | None) -> np.ndarray:
        import equinox as eqx

        layer = self._layer(x.shape[-1])
        state = eqx.nn.State(layer if stats else eqx.nn.Identity())
        if stats and layer.batch_state_index is not None:
            state = state.set(layer.batch_state_index, stats)
        return self._read(layer, _over_batch(layer, x, state)[1])[0]

    def _read(self, layer, state):
        """Mean and variance from the outputs for 0 and 1: no attribute has them."""
        import equinox as eqx

        probe = jnp.stack([jnp.zeros(layer.input_size), jnp.ones(layer.input_size)])
        y, _ = _over_batch(eqx.nn.inference_mode(layer), probe, state)
        at_0, at_1 = np.asarray(y)
        std = 1 / (at_1 - at_0)
        return -at_0 * std, std**2 - EPSILON


def _over_batch(layer, x, state):

    return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


class Torch:
    package = "torch"

    def train(self, batches: Sequence[Any], *, momentum: float | None = 0.99) -> Trained:
        """`momentum` is the weight of the old value, here as elsewhere; None is torch's."""
        import torch

        new = None if momentum is None else 1 - momentum
        layer = torch.nn.BatchNorm1d(batches[0].shape[-1], eps=EPSILON, momentum=new)
        y = torch.zeros(0)
        for x in batches:
            y = layer(_tensor(x)).detach()
        stats = (layer.get_buffer(f"running_{of}").numpy() for of in ("mean", "var"))
        return Trained(y.double().numpy(), *stats)  # NumPy has no bfloat16

    def restored(self, x: Any, stats: tuple | None) -> np.ndarray:
        import torch

        layer = torch.nn.BatchNorm1d(x.shape[-1], eps=EPSILON, momentum=0.01)
        names = ("running_mean", "running_var")
        state = {k: v for k, v in layer.state_dict().items() if k not in names}
        if stats is not None:
            state |= dict(zip(names, map(_tensor, stats), strict=True))
        layer.load_state_dict(state)
        layer(_tensor(x))
        return layer.get_buffer("running_mean").numpy()


def _tensor(x):
    import torch

    return torch.tensor(np.float64(x)).to(getattr(torch, str(x.dtype)))


@contextlib.contextmanager
def _without_warnings():
    with warnings.catch_warnings():
        # Of Keras' own conversions to NumPy, by what NumPy 2 deprecates.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield


class Keras:
    """On its JAX backend."""

    package = "keras"

    def _layer(self, **fields):
        import keras

        return keras.layers.BatchNormalization(epsilon=EPSILON, **fields)

    def as_mask(self, mask: np.ndarray, axis: int = -1) -> np.ndarray:
        """As Keras' own layers make them: without the feature axis."""
        return mask

    def train(self, batches: Sequence[Any], masks: Sequence[Any] = (), **fields) -> Trained:
        layer, y = self._layer(**fields), None
        for x, mask in zip(batches, masks or [None] * len(batches), strict=True):
            y = layer(x, training=True, mask=mask)
        return Trained(*map(self._numpy, (y, layer.moving_mean, layer.moving_variance)))

    def restored(self, x: Any, stats: tuple | None) -> np.ndarray:
        layer = self._with_stats(x, stats or ())
        layer(x, training=True)
        return self._numpy(layer.moving_mean)

    def evaluate(self, x: Any, mean: Any, var: Any, **fields) -> np.ndarray:
        return self._numpy(self._with_stats(x, (mean, var), **fields)(x, training=False))

    @_without_warnings()
    def _with_stats(self, x, stats, **fields):
        layer = self._layer(**fields)
        layer.build(x.shape)
        layer.set_weights([*layer.get_weights()[:2], *stats])
        return layer

    @_without_warnings()
    def _numpy(self, v) -> np.ndarray:
        import keras

        return np.asarray(keras.ops.convert_to_numpy(v))


FRAMEWORKS = {
    "bn_jax": Linen("bn_jax"),
    "flax linen": Linen("flax"),
    "flax nnx": NNX("flax"),
    "haiku": Haiku(),
    "equinox": Equinox(),
    "torch": Torch(),
    "keras": Keras(),
}


def load(name: str) -> None:
    """Imports the package of the framework of that name: an error then is no answer of it."""
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is first imported
    importlib.import_module(FRAMEWORKS[name].package)


@functools.cache
def installed(name: str) -> bool:
    """Whether the package of the framework of that name can be imported."""
    return importlib.util.find_spec(FRAMEWORKS[name].package) is not None
