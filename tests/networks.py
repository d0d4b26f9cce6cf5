"""A small network with one norm layer, as pure functions, whichever home the layer has."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType

import bn_jax
import bn_jax.linen
import bn_jax.nnx
from bn_jax.core.running import BatchStats, each

STEPS, EXAMPLES, INPUTS, FEATURES, GROUP, DEVICES, SEEDS = 3, 16, 3, 4, 8, 4, 4
KINDS = {
    "BatchNorm": (bn_jax.batch_norm, {}),
    "GhostBatchNorm": (bn_jax.ghost_batch_norm, {"group_size": GROUP}),
    "BatchRenorm": (
        bn_jax.batch_renorm,
        {"r_max": lambda count: 1.0 + count, "d_max": lambda count: count / 2},
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_home = pytest.mark.parametrize("home", ["functions", "linen", "nnx"])


# Each makes norm(x, params, stats, train) -> (y, stats), with dicts of the layer's variables.
def functions(kind, axis_name=None, remat=False):
    update = functools.partial(bn_jax.ema, momentum=0.9)
    update = functools.partial(each, update) if kind == "GhostBatchNorm" else update
    function, fields = KINDS[kind]

    def norm(x, params, stats, train):
        before = BatchStats(**{"count": jnp.int32(0)} | stats)
        if not train:
            return bn_jax.normalize(x, before.mean, before.var, **params), stats
        given = {"stats": before} if kind == "BatchRenorm" else {}
        f = functools.partial(function, **fields, **given, axis_name=axis_name)
        y, batch = (jax.checkpoint(f) if remat else f)(x, **params)
        after = update(before, lax.stop_gradient(batch))
        return y, {name: getattr(after, name) for name in stats}

    return norm


def linen(kind, axis_name=None, remat=False):
    layer = getattr(bn_jax.linen, kind)
    layer = nn.remat(layer, static_argnums=(2,)) if remat else layer
    layer = layer(**KINDS[kind][1], momentum=0.9, axis_name=axis_name)

    def norm(x, params, stats, train):
        variables = {"params": params, "batch_stats": stats}
        y, updated = layer.apply(variables, x, not train, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    return norm


def in_nnx(kind, axis_name=None, remat=False):
    layer = getattr(bn_jax.nnx, kind)
    layer = functools.partial(layer, FEATURES, **KINDS[kind][1], momentum=0.9)
    layer = layer(axis_name=axis_name, rngs=nnx.Rngs(0))

    def norm(x, params, stats, train):
        own = nnx.clone(layer)
        nnx.update(own, params | stats)

        def call(own, x):
            return own(x, not train)

        y = (nnx.remat(call) if remat else call)(own, x)
        return y, nnx.to_pure_dict(nnx.state(own, nnx.BatchStat))

    return norm


def equations(kind):
    def norm(x, params, stats, train):
        if not train:
            y = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
            return params["scale"] * y + params["bias"], stats
        groups = x.reshape(-1, GROUP if kind == "GhostBatchNorm" else len(x), x.shape[1])
        mean, var = groups.mean(1), groups.var(1)
        y, after = (groups - mean[:, None]) / jnp.sqrt(var + 1e-5)[:, None], dict(stats)
        if kind == "BatchRenorm":
            sigma, count = jnp.sqrt(stats["var"] + 1e-5), stats["count"]
            r = jnp.clip(jnp.sqrt(var + 1e-5) / sigma, 1 / (1 + count), 1 + count)
            d = jnp.clip((mean - stats["mean"]) / sigma, -count / 2, count / 2)
            y, after["count"] = y * lax.stop_gradient(r) + lax.stop_gradient(d), count + 1
        for m, v in zip(mean, var, strict=True):
            after["mean"] = 0.9 * after["mean"] + 0.1 * m
            after["var"] = 0.9 * after["var"] + 0.1 * v
        return params["scale"] * y.reshape(x.shape) + params["bias"], after

    return norm


HOMES = {"functions": functions, "linen": linen, "nnx": in_nnx, "equations": equations}
definitions = functools.partial(jax.numpy_rank_promotion, "allow")


def network(norm, params, stats, x, train):
    """`[examples, features]`, and the statistics."""
    y, stats = norm(jnp.dot(x, params["kernel"]), params["norm"], stats, train)
    return jnp.tanh(y), stats


def loss(norm, params, stats, x, target):
    """The part of the loss that these examples are, and the statistics."""
    y, stats = network(norm, params, stats, x, train=True)
    return jnp.sum((y - target) ** 2) / EXAMPLES, stats


def build(home, kind, *, around=lambda f: f, total=lambda g: g, **options):
    """step((params, stats), x, target) -> ((params, stats), outputs in evaluation)."""
    norm = HOMES[home](kind, **options)

    def step(state, x, target):
        of_params = around(functools.partial(loss, norm))
        gradients, stats = jax.grad(of_params, has_aux=True)(*state, x, target)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state[0], total(gradients))
        return (params, stats), network(norm, params, stats, x, train=False)[0]

    return step


def start(kind, seed=0):
    def normal(i, *shape):
        return jnp.asarray(np.random.default_rng((seed, i)).normal(size=shape), jnp.float32)

    norm = {"scale": 1 + normal(0, FEATURES), "bias": normal(1, FEATURES)}
    params = {"kernel": normal(2, INPUTS, FEATURES), "norm": norm}
    stats = BatchStats.create((FEATURES,))._asdict()
    if kind != "BatchRenorm":
        del stats["count"]
    return params, stats


def data():
    """x `[steps, examples, inputs]`, of another mean on every device, and targets."""
    x = np.random.default_rng(0).normal(size=(STEPS, EXAMPLES, INPUTS))
    x += np.arange(EXAMPLES).reshape(-1, 1) / GROUP
    return np.float32(x), np.sin(x @ np.ones((INPUTS, FEATURES))).astype(np.float32)


def loop(step, state):
    for batch in zip(*data(), strict=True):
        state, y = step(state, *batch)
    return state, y


def scan(step, state, batches):
    """y of every step."""
    return lax.scan(lambda state, batch: step(state, *batch), state, batches)


@functools.cache
def expected(kind):
    """The states of all seeds, and the last step's y."""
    with jax.enable_x64(True), definitions():
        states = jax.tree.map(lambda *v: np.float64(v), *(start(kind, s) for s in range(SEEDS)))
        run = jax.vmap(functools.partial(scan, build("equations", kind)), (0, None))
        states, y = jax.jit(run)(states, jax.tree.map(np.float64, data()))
        return jax.tree.map(np.asarray, (states, y[:, -1]))


def described(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype), tree)


def assert_close(got, want, tolerance=1e-5):
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, got, want)


def mesh(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
