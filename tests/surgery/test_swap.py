"""Norms in place of BatchNorms, against networks that are written with them."""

import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign_norms import NORMS as OWN_NORMS
from foreign_norms import X as OWN_X
from foreign_norms import OwnNorm
from models import BasicBlock, ResNet, drawn, with_variables

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import accumulate, accumulate_exactly, fold, freeze, recalibrate, swap
from bn_jax.surgery.tree import by_layer

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(1, 2, (8, 3, 2, 5)), jnp.float32)
VECTORS = jnp.asarray(RNG.normal(1, 2, (8, 5)), jnp.float32)
both_homes = pytest.mark.parametrize("home", ["linen", "nnx"])
STATS = {"epsilon": 1e-2, "momentum": 0.9}


class LinenNet(nn.Module):
    norm: type = functools.partial(nn.BatchNorm, **STATS)

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(8, name="a")(x)
        x = self.norm(name="bn")(x, use_running_average=not train)
        return nn.Dense(3, name="b")(nn.tanh(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs, norm=functools.partial(nnx.BatchNorm, **STATS)):
        self.a = nnx.Linear(5, 8, rngs=rngs)
        self.bn = norm(8, rngs=rngs)
        self.b = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.bn(self.a(x))))


class Written(nn.Module):
    """A norm of Flax, or a formula, with the call and the bias of a BatchNorm."""

    norm: type = None
    formula: object = None
    biased: bool = False

    @nn.compact
    def __call__(self, x, use_running_average):
        if self.norm is not None:
            layer = self.norm()
            nn.share_scope(self, layer)
            x = layer(x)
        if self.formula is not None:
            alpha = self.param("alpha", nn.initializers.constant(0.5), ())
            x = self.formula(x, alpha) * self.vector("scale", x)
        return x + self.vector("bias", x) if self.biased else x

    @nn.nowrap
    def vector(self, name, x):
        v = self.param(name, nn.initializers.ones, x.shape[-1:])
        return v.reshape((1,) * (x.ndim - 1) + v.shape)


def written(norm=None, **fields):
    norm = None if norm is None else functools.partial(norm, epsilon=STATS["epsilon"])
    return functools.partial(Written, norm, **fields)


CASES = {
    "none": ({}, written(biased=True)),
    "flax": ({}, functools.partial(nn.BatchNorm, **STATS)),
    "bn": ({}, functools.partial(bn_jax.linen.BatchNorm, **STATS)),
    "layer": ({}, written(nn.LayerNorm)),
    "group": ({}, written(functools.partial(nn.GroupNorm, num_groups=8))),
    "group of 4": ({"num_groups": 4}, written(functools.partial(nn.GroupNorm, num_groups=4))),
    "instance": ({}, written(nn.InstanceNorm)),
    "rms": ({}, written(nn.RMSNorm, biased=True)),
    "dyt": ({}, written(formula=lambda x, alpha: jnp.tanh(alpha * x), biased=True)),
    "ghost": (
        {"group_size": 4},
        functools.partial(bn_jax.linen.GhostBatchNorm, group_size=4, **STATS),
    ),
    "renorm": (
        {"r_max": 1.1, "d_max": 0.1},
        functools.partial(bn_jax.linen.BatchRenorm, r_max=1.1, d_max=0.1, **STATS),
    ),
}
each_norm = pytest.mark.parametrize("norm", CASES)


def both(home, norm, x):
    """What swapped and written networks make of the same variables: functions of them."""
    name, options = norm.split(" ")[0], CASES[norm][0]
    target = LinenNet(CASES[norm][1])
    if home == "linen":
        model = swap(LinenNet(), name, **options)
        variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))

        def run(variables, train):
            return model.apply(variables, x, train=train, mutable=["batch_stats"])
    else:
        module = swap(NnxNet(nnx.Rngs(0)), name, **options)
        graphdef, state = nnx.split(module)
        leaves = by_layer(state)
        variables = {"params": {}, "batch_stats": {}}
        for (layer,), values in leaves.items():
            for n, v in values.items():
                kind = "batch_stats" if n in ("mean", "var", "count") else "params"
                variables[kind].setdefault(layer, {})[n] = v
        variables = drawn(variables)

        def run(variables, train):
            module = nnx.merge(graphdef, state, copy=True)
            for kind in variables.values():
                for layer, values in kind.items():
                    for n, v in values.items():
                        getattr(getattr(module, layer), n).set_value(v)
            module.train() if train else module.eval()
            y = module(x)
            stats = {n: v[...] for n, v in vars(module.bn).items() if type(v) is nnx.BatchStat}
            return y, {"batch_stats": {"bn": stats}}

    def want(variables, train):
        own = jax.eval_shape(target.init, jax.random.key(0), x)
        params = {
            layer: {n: variables["params"][layer][n] for n in leaves}
            for layer, leaves in own["params"].items()
        }
        rest = {"batch_stats": variables["batch_stats"]} if "batch_stats" in own else {}
        given = {"params": params, **rest}
        y, new = target.apply(given, x, train=train, mutable=["batch_stats"])
        return y, new or {"batch_stats": variables["batch_stats"]}

    return run, want, variables


def results(run, variables):
    """In training the outputs, statistics and gradients, and the outputs in evaluation."""

    def loss(params):
        y, new = run({**variables, "params": params}, True)
        return jnp.mean(jnp.sin(y)), (y, new)

    (_, trained), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return trained, grads, run(variables, False)


def assert_close(got, want, tolerance=2e-5):
    """Arrays of the same tree, to rounding of the largest of them."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    largest = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest)
        assert a.dtype == b.dtype


@pytest.mark.parametrize(
    ("home", "x"),
    [("linen", IMAGES), ("linen", VECTORS), ("nnx", IMAGES)],
    ids=["linen-images", "linen-vectors", "nnx-images"],
)
@each_norm
def test_as_the_network_that_is_written_with_it(home, norm, x):
    if x.ndim == 2 and norm in ("instance", "group"):
        pytest.skip("one element to normalise over")
    run, want, variables = both(home, norm, x)
    pair = jax.jit(lambda v: (results(run, v), results(want, v)))(variables)
    for got, expected in zip(*pair, strict=True):
        assert_close(got, expected)


def test_dyt_in_float64():
    model = swap(LinenNet(), "dyt", alpha=0.7)
    variables = model.init(jax.random.key(0), VECTORS)
    assert variables["params"]["bn"]["alpha"] == np.float32(0.7)
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), drawn(variables)["params"])
    x = np.asarray(VECTORS, np.float64) @ params["a"]["kernel"] + params["a"]["bias"]
    bn = params["bn"]
    y = np.tanh(bn["scale"] * np.tanh(bn["alpha"] * x) + bn["bias"])
    want = y @ params["b"]["kernel"] + params["b"]["bias"]
    np.testing.assert_allclose(model.apply(drawn(variables), VECTORS), want, atol=1e-5)
