"""Layers go through pickle, cloudpickle and deepcopy, and come out equal."""

import copy
import pickle

import jax
import numpy as np
import pytest
from flax import nnx

import bn_jax
import bn_jax.linen
import bn_jax.nnx
from bn_jax.core import presets

X = np.float32(np.random.default_rng(0).normal(size=(8, 3)))
WAYS = {"pickle": lambda v: pickle.loads(pickle.dumps(v)), "deepcopy": copy.deepcopy}
FIELDS = [
    *((name, {}) for name in ("BatchNorm", "GhostBatchNorm", "BatchRenorm")),
    *(("BatchNorm", settings) for settings in presets.PRESETS.values()),
    ("GhostBatchNorm", {"group_size": 4, "strided": True}),
    ("BatchRenorm", {"r_max": 2.0, "d_max": 1.0, "estimator": bn_jax.debiased_ema}),
]


def with_cloudpickle(v):
    return pickle.loads(pytest.importorskip("cloudpickle").dumps(v))


@pytest.fixture(params=[*WAYS, "cloudpickle"])
def through(request):
    return WAYS.get(request.param, with_cloudpickle)


@pytest.mark.parametrize(("name", "fields"), FIELDS)
def test_linen(name, fields, through):
    layer = getattr(bn_jax.linen, name)(use_running_average=False, **fields)
    after = through(layer)
    assert after == layer
    assert hash(after) == hash(layer)
    variables = layer.init(jax.random.key(0), X)
    want, got = (m.apply(variables, X, mutable=["batch_stats"]) for m in (layer, after))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(("name", "fields"), FIELDS)
def test_nnx(name, fields, through):
    layer = getattr(bn_jax.nnx, name)(3, rngs=nnx.Rngs(0), **fields)
    layer(X)
    after = through(layer)
    assert nnx.graphdef(after) == nnx.graphdef(layer)
    np.testing.assert_array_equal(after(X), layer(X))
    states = (nnx.to_pure_dict(nnx.state(m)) for m in (after, layer))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(
    "value",
    [
        bn_jax.moments(X),
        bn_jax.BatchStats.create((3,)),
        bn_jax.batch_norm,
        bn_jax.ema,
        presets.equinox_ema,
        bn_jax.core.renorm.ramp(1.0, 3.0, 10, 20),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_functions_and_statistics(value, through):
    after = through(value)
    assert type(after) is type(value)
    if isinstance(value, tuple):
        jax.tree.map(np.testing.assert_array_equal, after, value)
    else:
        assert after == value
