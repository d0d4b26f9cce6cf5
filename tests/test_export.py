"""Programs that `jax.export` writes: for any batch size and platform, with our named tuples."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from layers import make_linen, make_nnx

import bn_jax
from bn_jax.core import population

X = np.float32(np.random.default_rng(0).normal(size=(12, 3)))
STATS = bn_jax.BatchStats.create((3,))
PLATFORMS = ("cpu", "cuda", "tpu")


def ghosts(x, **options):
    y, batch = bn_jax.ghost_batch_norm(
        x, group_size=4, mask=jnp.abs(x[:, :1]) < 1.5, allow_single=True, **options
    )
    return y, batch.mean


def domains(x):
    domain = jnp.arange(x.shape[0]) % 2
    y, batch = bn_jax.domain_batch_norm(x, domain, 2)
    return y, bn_jax.domain_normalize(x, domain, batch.mean, batch.var)


def estimates(x):
    batch = bn_jax.moments(x)
    for estimator in (bn_jax.ema, bn_jax.debiased_ema, bn_jax.cumulative_mean):
        yield estimator(STATS, batch, unbiased=True)
    yield population.algorithm_2([batch, batch])
    yield population.pooled([batch, batch])


FUNCTIONS = {
    "batch_norm": lambda x: bn_jax.batch_norm(x, activation=jax.nn.relu),
    "gradient": jax.grad(lambda x: jnp.sum(bn_jax.batch_norm(x)[0] ** 3)),
    "renorm": lambda x: bn_jax.batch_renorm(x, STATS),
    "ghosts": ghosts,
    "strided ghosts": functools.partial(ghosts, strided=True),
    "gradient of ghosts": jax.grad(lambda x: jnp.sum(ghosts(x)[0] ** 3)),
    "domains": domains,
    "estimates": lambda x: list(estimates(x)),
}


def symbolic(f, features=3):
    """f exported for any number of examples and every platform, written and read."""
    x = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), features), jnp.float32)
    return export.deserialize(export.export(jax.jit(f), platforms=PLATFORMS)(x).serialize())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_batch_size(name):
    f = FUNCTIONS[name]
    exported = symbolic(f)
    for n in (3, 4, 9, 12):
        got, want = exported.call(X[:n]), f(X[:n])
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, want)


@pytest.mark.parametrize(
    ("size", "dtype", "operation"),
    [
        (64, "bfloat16", "optimization_barrier"),  # names of a bfloat16's own, on CPU
        (64, "float32", "compare"),  # a ReLU's mask for each term, but on CPU
        (1 << 16, "float32", "stablehlo.reduce"),  # raw sums, on CPU
        (1 << 25, "float32", "stablehlo.reduce"),  # and on TPU
    ],
)
def test_a_program_for_all_platforms_has_the_one_of_each(size, dtype, operation):
    def f(x):
        return jax.grad(lambda x: bn_jax.batch_norm(x, activation=jax.nn.relu)[0].sum())(x)

    def exported(*platforms, size=size):
        x = jax.ShapeDtypeStruct((size, 1), dtype)
        return export.export(jax.jit(f), platforms=platforms)(x)

    alone = {p: exported(p).mlir_module().count(operation) for p in PLATFORMS}
    together = exported(*PLATFORMS).mlir_module().count(operation)
    assert alone["cpu"] != alone["cuda"]
    assert (alone["tpu"] != alone["cuda"]) == (size == 1 << 25)
    assert together > max(alone.values())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1)), dtype)
    np.testing.assert_array_equal(exported(*PLATFORMS, size=64).call(x), jax.jit(f)(x))


@pytest.mark.parametrize("make", [make_linen, make_nnx])
@pytest.mark.parametrize("name", ["BatchNorm", "GhostBatchNorm", "BatchRenorm"])
@pytest.mark.parametrize("train", [True, False])
def test_layers(make, name, train):
    layer = make(name, **({"group_size": 4} if name == "GhostBatchNorm" else {}))
    variables = layer.init(X)
    exported = symbolic(lambda x: layer.apply(variables, x, train))
    want = layer.apply(variables, X, train)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), exported.call(X), want
    )


def test_statistics_are_written_and_read():
    stats = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), STATS)
    exported = export.export(jax.jit(bn_jax.ema))(stats, bn_jax.Moments(*stats[:2], stats.mean))
    read = export.deserialize(exported.serialize())
    batch = bn_jax.Moments(*jnp.full((3, 3), 4.0))
    got, want = read.call(STATS, batch), bn_jax.ema(STATS, batch)
    assert type(got) is bn_jax.BatchStats
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_importing_needs_neither_flatbuffers_nor_jax():
    code = (
        "import sys; sys.modules['flatbuffers'] = None; import bn_jax;"
        "assert 'jax' not in sys.modules; bn_jax.Moments, bn_jax.BatchStats"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
