"""Every function on an explicit mesh, JAX's default, has the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax import (
    BatchStats,
    batch_norm,
    batch_renorm,
    cumulative_mean,
    debiased_ema,
    domain_batch_norm,
    domain_normalize,
    ema,
    ghost_batch_norm,
    merge,
    moments,
    normalize,
    skip_nonfinite,
)
from bn_jax.core.population import algorithm_2, pooled
from bn_jax.core.running import each
from bn_jax.core.sync import pool_first_axis

N, C, D = 16, 6, 3
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


VALUES = {
    "x": 3 * normal(N, C) + 2,
    "domain": np.arange(N) % D,
    "mask": RNG.random((N, 1)) < 0.7,
    "weights": RNG.random((N, 1)).astype(np.float32),
    "per_feature": RNG.random((N, C)) < 0.7,
    "scale": normal(C),
    "bias": normal(C),
    "mean": normal(C),
    "var": normal(C) ** 2 + 0.1,
    "of_domains": normal(D, C),
    "of_examples": normal(N, C),
}
BATCH, CHANNEL = "batch", "channel"
AXES = {(C,): (CHANNEL,), (N,): (BATCH,), (D, C): (None, CHANNEL), (N, 1): (BATCH, None)}


def stats(v):
    return BatchStats(v["mean"], v["var"], jnp.int32(3))


def affine(v):
    return {"scale": v["scale"], "bias": v["bias"]}


def ghosts(v, size=4, **options):
    return ghost_batch_norm(v["x"], **affine(v), group_size=size, **options)


def domains(v, **options):
    return domain_batch_norm(v["x"], v["domain"], D, **options)


def both(v):
    return [moments(v["x"], mask=v["weights"]), moments(v["x"])]


FUNCTIONS = {
    "moments": lambda v: moments(v["x"]),
    "moments of weights": lambda v: moments(v["x"], mask=v["weights"]),
    "merge": lambda v: merge(*both(v)),
    "batch_norm": lambda v: batch_norm(v["x"], **affine(v), activation=jax.nn.relu),
    "mask": lambda v: batch_norm(v["x"], **affine(v), mask=v["mask"]),
    "mask per feature": lambda v: batch_norm(v["x"], mask=v["per_feature"]),
    "scale of examples": lambda v: batch_norm(v["x"], v["of_examples"], mask=v["weights"]),
    "bfloat16": lambda v: batch_norm(v["x"].astype(jnp.bfloat16))[1],
    "normalize": lambda v: normalize(v["x"], v["mean"], v["var"], v["of_examples"], v["bias"]),
    "ghosts": ghosts,
    "strided ghosts": lambda v: ghosts(v, strided=True, mask=v["weights"]),
    "uneven ghosts": lambda v: ghosts(v, 7, mask=v["per_feature"]),
    "one ghost": lambda v: ghosts(v, N),
    "renorm": lambda v: batch_renorm(v["x"], stats(v), **affine(v), mask=v["weights"]),
    "domains": lambda v: domains(v, **affine(v)),
    "domains of weights": lambda v: domains(v, scale=v["of_domains"], mask=v["weights"]),
    "domains per feature": lambda v: domains(v, mask=v["per_feature"]),
    "domain_normalize": lambda v: domain_normalize(
        v["x"], v["domain"], v["of_domains"], v["of_domains"] ** 2 + 1, v["scale"]
    ),
    "ema": lambda v: ema(stats(v), moments(v["x"])),
    "debiased_ema": lambda v: debiased_ema(
        stats(v), moments(v["x"], mask=v["per_feature"]), unbiased=True
    ),
    "cumulative_mean": lambda v: cumulative_mean(stats(v), skip_nonfinite(moments(v["x"]))),
    "statistics of domains": lambda v: jax.vmap(ema)(
        BatchStats.create((C,), domains=D), domains(v)[1]
    ),
    "one ghost after another": lambda v: each(ema, stats(v), ghosts(v)[1]),
    "pooled": lambda v: pooled(both(v)),
    "algorithm_2": lambda v: algorithm_2(both(v)),
    "pool_first_axis": lambda v: pool_first_axis(ghosts(v)[1]),
}


# The others are long.
OFTEN = {"batch_norm", "mask", "ghosts", "renorm", "domains", "debiased_ema"}


def with_gradient(f, v):
    """What f returns, and the gradient by x of a sum of functions of it."""

    def loss(x):
        found = f({**v, "x": x})
        floats = [u for u in jax.tree.leaves(found) if jnp.issubdtype(u.dtype, jnp.inexact)]
        return sum(jnp.sum(jnp.sin(u)) for u in floats), found

    dx, found = jax.grad(loss, has_aux=True)(v["x"])
    return found, dx


@functools.cache
def on_one_device(name):
    return jax.jit(functools.partial(with_gradient, FUNCTIONS[name]))(VALUES)


@pytest.mark.parametrize(
    "sharded",
    [
        pytest.param((BATCH,), marks=pytest.mark.long),
        pytest.param((CHANNEL,), marks=pytest.mark.long),
        (BATCH, CHANNEL),
    ],
    ids="+".join,
)
@pytest.mark.parametrize(
    "name",
    [n if n in OFTEN else pytest.param(n, marks=pytest.mark.long) for n in FUNCTIONS],
)
def test_sharded_is_one_device(name, sharded):
    want = jax.tree.map(np.asarray, on_one_device(name))
    run = jax.jit(functools.partial(with_gradient, FUNCTIONS[name]))
    mesh = jax.make_mesh((2, 2), (BATCH, CHANNEL))

    def put(v, spread):
        axes = AXES.get(v.shape, (BATCH, CHANNEL))
        spec = P(*(a if a in sharded and spread else None for a in axes))
        return jax.device_put(v, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        for every in True, False:  # arguments like x, or x alone
            placed = {name: put(v, every or name == "x") for name, v in VALUES.items()}
            got = run(placed)
            compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
            jax.tree.map(compare, jax.tree.map(np.asarray, got), want)
            first, x = (jax.typeof(v) for v in (jax.tree.leaves(got)[0], placed["x"]))
            assert first.shape != x.shape or first.sharding == x.sharding
        jax.tree.map(compare, jax.tree.map(np.asarray, FUNCTIONS[name](placed)), want[0])
