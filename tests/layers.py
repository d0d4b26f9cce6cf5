"""One adapter for the layers of Linen and of NNX, and for those of other frameworks."""

import jax
import numpy as np
from flax import nnx

import bn_jax.linen
import bn_jax.nnx


class Layer:
    """Functions of the variables, a dict of arrays: `init(x)`, `apply(variables, x, train)`."""

    def gradients(self, variables, x, dy):
        """What dy, the cotangent of y in training, becomes for x, scale and bias."""

        def f(x, scale, bias):
            return self.apply(variables | {"scale": scale, "bias": bias}, x)[0]

        return jax.vjp(f, x, variables["scale"], variables["bias"])[1](dy)

    def statistics(self, variables):
        return variables["mean"], variables["var"]


class Linen(Layer):
    def __init__(self, layer):
        self.layer = layer

    def init(self, x):
        tree = self.layer.init(jax.random.key(0), x, use_running_average=False)
        return {**tree.get("params", {}), **tree["batch_stats"]}

    def apply(self, variables, x, train=True, **given):
        params = {n: v for n, v in variables.items() if n in ("scale", "bias")}
        stats = {n: v for n, v in variables.items() if n not in params}
        y, updates = self.layer.apply(
            {"params": params, "batch_stats": stats}, x,
            use_running_average=not train, mutable=["batch_stats"], **given,
        )  # fmt: skip
        return y, variables | updates["batch_stats"]


class NNX(Layer):
    def __init__(self, layer):
        self.graph, self.state = nnx.split(layer)

    def init(self, x):
        return nnx.to_pure_dict(self.state)

    def apply(self, variables, x, train=True, **given):
        state = jax.tree.map(lambda v: v, self.state)
        nnx.replace_by_pure_dict(state, variables)
        layer = nnx.merge(self.graph, state)
        y = layer(x, use_running_average=not train, **given)
        return y, nnx.to_pure_dict(nnx.state(layer))


def make_linen(name="BatchNorm", features=3, **fields):
    return Linen(getattr(bn_jax.linen, name)(**fields))


def make_nnx(name="BatchNorm", features=3, **fields):
    return NNX(getattr(bn_jax.nnx, name)(features, rngs=nnx.Rngs(0), **fields))


def assert_close(got, want, tolerance=1e-5):
    """Of two trees, relative to the largest of each array."""

    def compare(got, want):
        atol = tolerance * np.max(np.abs(want))
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)

    jax.tree.map(compare, got, want)
