"""`BatchNorm.like(framework)` beside the framework itself."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from layers import NNX, Layer, Linen, assert_close

import bn_jax.linen
import bn_jax.nnx
from bn_jax import cumulative_mean

RNG = np.random.default_rng(0)
FEATURES = 5
SCALE, BIAS = np.float32(RNG.normal(size=(2, FEATURES)))


def flax_linen():
    return Linen(nn.BatchNorm(use_fast_variance=False))


def flax_nnx():
    return NNX(nnx.BatchNorm(FEATURES, use_fast_variance=False, rngs=nnx.Rngs(0)))


class Haiku(Layer):
    def __init__(self):
        hk = pytest.importorskip("haiku")

        def f(x, train):
            return hk.BatchNorm(True, True, decay_rate=0.99)(x, is_training=train)

        self.f = hk.transform_with_state(f)

    def init(self, x):
        return {"state": self.f.init(None, x, True)[1]}

    def apply(self, variables, x, train=True):
        scale, offset = (
            variables[name].reshape(1, 1, 1, FEATURES) for name in ("scale", "bias")
        )
        params = {"batch_norm": {"scale": scale, "offset": offset}}
        y, state = self.f.apply(params, variables["state"], None, x, train)
        return y, variables | {"state": state}

    def statistics(self, variables):
        return tuple(
            variables["state"][f"batch_norm/~/{name}_ema"]["average"].ravel()
            for name in ("mean", "var")
        )


class Equinox(Layer):
    def __init__(self):
        self.eqx = pytest.importorskip("equinox")
        self.layer = self.eqx.nn.BatchNorm(FEATURES, "batch", mode="batch")

    def init(self, x):
        return {"state": self.eqx.nn.State(self.layer)}

    def apply(self, variables, x, train=True):
        values = variables["scale"], variables["bias"]
        layer = self.eqx.tree_at(lambda layer: (layer.weight, layer.bias), self.layer, values)
        one = functools.partial(layer, inference=not train)
        mapped = jax.vmap(one, (0, None), (0, None), axis_name="batch")
        y, state = mapped(jnp.moveaxis(x, -1, 1), variables["state"])
        return jnp.moveaxis(y, 1, -1), variables | {"state": state}

    def statistics(self, variables):
        state = variables["state"]
        # In float32, as there, it would be off by 1.5e-6.
        debiasing = 1 - self.layer.momentum ** int(state.get(self.layer.batch_counter))
        return tuple(v / debiasing for v in state.get(self.layer.batch_state_index))


class Keras(Layer):
    def __init__(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KERAS_BACKEND", "jax")  # read when Keras is first imported
            self.layer = pytest.importorskip("keras").layers.BatchNormalization()

    def init(self, x):
        self.layer.build(x.shape)
        return {"mean": jnp.zeros(FEATURES), "var": jnp.ones(FEATURES)}

    def apply(self, variables, x, train=True):
        params, stats = (
            [variables[n] for n in names] for names in (("scale", "bias"), ("mean", "var"))
        )
        y, stats = self.layer.stateless_call(params, stats, x, training=train)
        return y, variables | dict(zip(("mean", "var"), stats, strict=True))


TORCH_NAMES = {
    "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"
}  # fmt: skip


class Torch(Layer):
    def __init__(self, **settings):
        self.torch = pytest.importorskip("torch")
        self.settings = settings

    def init(self, x):
        self.layer = self.torch.nn.BatchNorm2d(FEATURES, **self.settings)
        return {"mean": np.zeros(FEATURES), "var": np.ones(FEATURES), "count": 0}

    def _call(self, variables, x, train=True):
        state = {ours: self.torch.tensor(variables[name]) for name, ours in TORCH_NAMES.items()}
        state["num_batches_tracked"] = self.torch.tensor(variables["count"])
        self.layer.load_state_dict(state)
        x = self.torch.tensor(np.moveaxis(x, -1, 1)).requires_grad_()
        return x, self.layer.train(train)(x)

    def apply(self, variables, x, train=True):
        _, y = self._call(variables, x, train)
        state = {n: v.numpy() for n, v in self.layer.state_dict().items()}
        after = {ours: np.copy(state[theirs]) for ours, theirs in TORCH_NAMES.items()}
        after["count"] = int(state["num_batches_tracked"])
        return np.moveaxis(y.detach().numpy(), 1, -1), after

    def gradients(self, variables, x, dy):
        x, y = self._call(variables, x)
        given = x, self.layer.weight, self.layer.bias
        dy = self.torch.tensor(np.moveaxis(dy, -1, 1))
        dx, *rest = self.torch.autograd.grad(y, given, dy)
        return np.moveaxis(dx.numpy(), 1, -1), *(v.numpy() for v in rest)


class Paper(Layer):
    """Algorithms 1 and 2 of Ioffe & Szegedy 2015 in float64; batches of one size."""

    def init(self, x):
        return {"seen": []}

    def apply(self, variables, x, train=True):
        scale_and_bias = variables["scale"], variables["bias"]
        if not train:
            statistics = self.statistics(variables)
            return reference.normalize(x, *statistics, *scale_and_bias), variables
        y, seen = reference.batch_norm(x, *scale_and_bias)
        return y, variables | {"seen": [*variables["seen"], seen]}

    def gradients(self, variables, x, dy):
        zeros = np.zeros(FEATURES)
        return reference.gradients(x, dy, zeros, zeros, variables["scale"])[:3]

    def statistics(self, variables):
        """line 10: E[x] = E_B[mean_B], Var[x] = m/(m-1) E_B[var_B]"""
        mean, var, m, _ = (np.array(v) for v in zip(*variables["seen"], strict=True))
        return mean.mean(0), np.mean(m / (m - 1) * var, axis=0)


PEERS = {
    "flax linen": ("flax", {}, flax_linen),
    "flax nnx": ("flax", {}, flax_nnx),
    "torch": ("torch", {}, Torch),
    "torch momentum=None": (
        "torch", {"estimator": cumulative_mean}, functools.partial(Torch, momentum=None)
    ),
    "torch momentum=.3 eps=.01": (
        "torch", {"momentum": 0.7, "epsilon": 0.01},
        functools.partial(Torch, momentum=0.3, eps=0.01),
    ),
    "keras": ("keras", {}, Keras),
    "haiku": ("haiku", {}, Haiku),
    "equinox": ("equinox", {}, Equinox),
    "paper": ("paper", {}, Paper),
}  # fmt: skip


def batches(sizes):
    """20 of small images, of unequal mean and std, and the cotangent of the last output."""
    rng = np.random.default_rng(1)
    loc, std = rng.normal(size=FEATURES), [0.5, 0.7, 1, 1.4, 2]
    xs = [
        np.float32(std * (rng.normal(size=(sizes[i % len(sizes)], 2, 3, FEATURES)) + loc))
        for i in range(20)
    ]
    return xs, np.float32(rng.normal(size=xs[-1].shape))


def run(layer, xs, dy):
    """All that 20 steps of training and one evaluation show."""
    variables = layer.init(xs[0]) | {"scale": SCALE, "bias": BIAS}
    outputs = []
    for x in xs:
        before = variables
        y, variables = layer.apply(variables, x)
        outputs.append(y)
    return {
        "training": outputs,
        "evaluation": layer.apply(variables, xs[-1], train=False)[0],
        "statistics": layer.statistics(variables),
        "gradients": layer.gradients(before, xs[-1], dy),
    }


@functools.cache
def of_peer(name):
    sizes = (12,) if name == "paper" else (12, 7)
    xs, dy = batches(sizes)
    return xs, dy, run(PEERS[name][2](), xs, dy)


def like_linen(framework, **fields):
    return Linen(bn_jax.linen.BatchNorm.like(framework, **fields))


def like_nnx(framework, **fields):
    return NNX(bn_jax.nnx.BatchNorm.like(framework, FEATURES, rngs=nnx.Rngs(0), **fields))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("like", [like_linen, like_nnx])
def test_presets_are_their_frameworks(name, like):
    xs, dy, want = of_peer(name)
    framework, fields, _ = PEERS[name]
    assert_close(run(like(framework, **fields), xs, dy), want, 1e-6)


@pytest.mark.parametrize("like", [like_linen, like_nnx])
def test_an_unknown_framework_is_refused(like):
    with pytest.raises(ValueError, match=r"'caffe'.*flax, torch, keras, haiku, equinox, paper"):
        like("caffe")
