"""Under `jax.numpy_dtype_promotion("strict")` the same programs are compiled as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from layers import make_linen, make_nnx

import bn_jax
from bn_jax.core import population, presets, renorm, running, sync

X = np.random.default_rng(0).normal(size=(8, 2, 3))
DTYPES = ["float32", "float16", "bfloat16", "float64", "complex64"]
MASKS = {"none": None, "bool": np.arange(8) < 5, "float": np.linspace(0, 2, 8)}
ESTIMATORS = [bn_jax.ema, bn_jax.debiased_ema, bn_jax.cumulative_mean, presets.equinox_ema]


def assert_same_program(f, *arguments):
    """f's, and that of a gradient of jitted f, whose rules run when f has been traced."""

    def size(x, *others):
        leaves = jax.tree.leaves(jax.jit(f)(x, *others))
        floating = [v for v in leaves if jnp.issubdtype(v.dtype, jnp.inexact)]
        return sum(jnp.abs(v).sum().astype(jnp.float32) for v in floating)

    def programs():
        both = f, jax.grad(size)
        return [jax.jit(lambda *a, g=g: g(*a)).lower(*arguments).as_text() for g in both]

    standard = programs()
    with jax.numpy_dtype_promotion("strict"):
        assert programs() == standard


def draw(dtype, mask="none"):
    """x of that dtype, and the mask of its examples."""
    mask = MASKS[mask]
    return jnp.asarray(X, dtype), None if mask is None else mask.reshape(8, 1, 1)


@pytest.mark.parametrize("make", [make_linen, make_nnx])
@pytest.mark.parametrize("name", ["BatchNorm", "GhostBatchNorm", "BatchRenorm"])
@pytest.mark.parametrize(
    ("dtype", "mask"),
    [
        ("float32", "none"), ("float16", "bool"), ("bfloat16", "float"),
        ("float64", "float"), ("complex64", "bool"),
    ],
)  # fmt: skip
def test_layers(make, name, dtype, mask, x64):
    x, mask = draw(dtype, mask)
    fields = {"group_size": 3} if name == "GhostBatchNorm" else {}
    if dtype == "complex64" and make is make_nnx:
        fields["stats_dtype"] = dtype
    layer = make(name, **fields, activation=None if dtype == "complex64" else nnx.relu)
    variables = layer.init(x)
    assert_same_program(lambda x, variables: layer.apply(variables, x, mask=mask), x, variables)
    assert_same_program(lambda x, variables: layer.apply(variables, x, False), x, variables)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("make", [make_linen, make_nnx])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float64"])
def test_estimators_in_layers(make, estimator, param_dtype, x64):
    x = jnp.asarray(X, jnp.float32)
    fields = {"param_dtype": param_dtype, "unbiased": True, "skip_nonfinite": True}
    layer = make(estimator=estimator, **fields)
    assert_same_program(lambda x, v: layer.apply(v, x), x, layer.init(x))


@pytest.mark.parametrize("framework", presets.PRESETS)
def test_presets(framework):
    x = jnp.asarray(X, jnp.float32)
    settings = presets.PRESETS[framework]
    layer = make_linen(**settings)
    assert_same_program(lambda x, v: layer.apply(v, x), x, layer.init(x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_feature", [False, True])
def test_estimators(estimator, dtype, per_feature, x64):
    x, _ = draw(dtype)
    wide = jnp.complex128 if dtype == "complex64" else jnp.float64

    def update(x, stats):
        batch = bn_jax.skip_nonfinite(bn_jax.moments(x))
        return estimator(estimator(stats, batch), batch, unbiased=True)

    for kind in (x.dtype, wide):
        stats = running.BatchStats.create((3,), kind, per_feature=per_feature)
        assert_same_program(update, x, stats)


def test_schedules_of_momentum():
    x, stats = jnp.asarray(X, jnp.float32), running.BatchStats.create((3,))
    momentum = renorm.ramp(0.5, 0.9, 10, 20)
    assert_same_program(lambda x: bn_jax.ema(stats, bn_jax.moments(x), momentum=momentum), x)
    assert_same_program(momentum, jnp.float32(15))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("mask", MASKS)
def test_functions_of_mixed_dtypes(x_dtype, dtype, mask, x64):
    x, mask = draw(x_dtype, mask)
    scale, bias, epsilon = jnp.ones(3, dtype), np.zeros(3, np.float32), jnp.asarray(1e-3, dtype)

    def normalise(x, scale, bias, epsilon):
        y, batch = bn_jax.batch_norm(x, scale, bias, epsilon=epsilon, mask=mask)
        return y, bn_jax.normalize(x, batch.mean, scale, scale, bias, epsilon=epsilon)

    assert_same_program(normalise, x, scale, bias, epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_domains(dtype, mask, x64):
    x, mask = draw(dtype, mask)
    domain = jnp.arange(8, dtype=jnp.int8) % 3

    def f(x, scale):
        y, batch = bn_jax.domain_batch_norm(x, domain, 3, scale, mask=mask)
        stats = running.BatchStats.create((3,), batch.mean.dtype, domains=3)
        stats = jax.vmap(bn_jax.ema)(stats, batch)
        return y, bn_jax.domain_normalize(x, domain, stats.mean, stats.var, scale)

    assert_same_program(f, x, jnp.ones(3, jnp.float32))


@pytest.mark.parametrize("estimate", [population.algorithm_2, population.pooled])
def test_population(estimate, x64):
    mask = MASKS["bool"].reshape(8, 1, 1)

    def f(x, y):
        return estimate([bn_jax.moments(x), bn_jax.moments(y, mask=mask)])

    assert_same_program(f, jnp.asarray(X, jnp.bfloat16), jnp.asarray(X))


@pytest.mark.parametrize("merged", [sync.sync, sync.sync_once])
@pytest.mark.parametrize("groups", [None, [[0, 2, 1], [3]]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_replicas(merged, groups, dtype, make_mesh, x64):
    def one(x):
        return bn_jax.batch_norm(
            x, jnp.ones(3, jnp.float32), axis_name="batch", axis_index_groups=groups,
            sync=merged, mask=jnp.ones((2, 1, 1), bool),
        )  # fmt: skip

    x = jnp.asarray(X, dtype)
    mesh = make_mesh(batch=4)
    sharded = jax.shard_map(one, mesh=mesh, in_specs=P("batch"), out_specs=(P("batch"), P()))
    if groups is None:
        assert_same_program(sharded, x)
    assert_same_program(jax.vmap(one, axis_name="batch"), x.reshape(4, 2, 2, 3))


def test_ghosts_of_several_devices(make_mesh):
    def one(x):
        return bn_jax.ghost_batch_norm(x, group_size=4, axis_name="batch", mask=x[..., :1] > 0)

    sharded = jax.shard_map(
        one, mesh=make_mesh(batch=4), in_specs=P("batch"), out_specs=(P("batch"), P())
    )
    assert_same_program(sharded, jnp.asarray(X, jnp.bfloat16))
