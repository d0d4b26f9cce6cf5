"""A network with convolutions of every sort and BatchNorms, in Linen and in NNX.

In float64, where what is converted wrongly cannot be taken for rounding.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bn_jax.linen
import bn_jax.nnx

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4, 4, 3))
MORE = [RNG.normal(size=X.shape) for _ in range(2)]
TORCH_PADS = ((1, 2), (2, 2))  # 3 - 1 - padding, and the output_padding after it
SHAPE = (8, 8, 8)  # [C, H, W] before the flattening


class Net(nn.Module):
    """conv, depthwise conv, conv transposed, each with a BatchNorm; and a head."""

    like: str
    pads: tuple | str = "SAME"
    momentum: float = 0.9
    transpose_kernel: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(
            bn_jax.linen.BatchNorm.like, self.like, use_running_average=not train,
            momentum=self.momentum, epsilon=self.epsilon,
        )  # fmt: skip
        x = nn.relu(norm()(nn.Conv(6, (3, 3), use_bias=False)(x)))
        x = nn.relu(norm()(nn.Conv(12, (3, 3), feature_group_count=6)(x)))
        x = nn.ConvTranspose(
            8, (3, 4), (2, 2), padding=self.pads, transpose_kernel=self.transpose_kernel
        )(x)
        x = nn.relu(norm()(x))
        x = nn.Dense(9)(x.reshape(len(x), -1))
        return nn.Dense(5)(nn.relu(x))


class OfNNX(nnx.Module):
    """The same; attributes in another order than that of the calls."""

    def __init__(self, rngs, pads="SAME"):
        norm = functools.partial(bn_jax.nnx.BatchNorm.like, "torch", rngs=rngs)
        self.z = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.y = nnx.Conv(6, 12, (3, 3), feature_group_count=6, rngs=rngs)
        self.x = nnx.ConvTranspose(
            12, 8, (3, 4), (2, 2), padding=pads, transpose_kernel=True, rngs=rngs
        )
        self.norms = nnx.List([norm(6), norm(12), norm(8)])
        self.b = nnx.Linear(8 * 8 * 8, 9, rngs=rngs)
        self.a = nnx.Linear(9, 5, rngs=rngs)

    def __call__(self, x, train=False):
        for layer, norm in zip((self.z, self.y, self.x), self.norms, strict=True):
            x = nnx.relu(norm(layer(x), use_running_average=not train))
        x = self.b(x.reshape(len(x), -1))
        return self.a(nnx.relu(x))


def linen(like, **fields):
    model = Net(like, **fields)
    return model, filled(jax.eval_shape(model.init, jax.random.key(0), X))


def of_nnx(pads="SAME"):
    graph, state = nnx.split(nnx.eval_shape(lambda: OfNNX(nnx.Rngs(0), pads)))
    return graph, filled(state)


def filled(shapes):
    """Values, none of a vector negative: compiling the initialisers would take seconds."""
    rng = np.random.default_rng(3)

    def value(v):
        if v.dtype == jnp.int32:
            return jnp.zeros(v.shape, v.dtype)
        low = -0.3 if v.ndim > 1 else 0.5
        return jnp.asarray(rng.uniform(low, low + 0.6, v.shape))

    return jax.tree.map(value, shapes)


def call(model, variables, x, train=False):
    """y and the variables afterwards."""
    return _call(model, variables, x, train)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _call(model, variables, x, train):
    if not isinstance(model, nnx.GraphDef):
        y, new = model.apply(variables, x, train, mutable=["batch_stats"])
        return y, {**variables, **new}
    module = nnx.merge(model, variables, copy=True)
    return module(x, train), nnx.state(module)
