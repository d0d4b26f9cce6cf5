import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import StandardCheckpointer

from bn_jax.core.running import debiased_ema
from bn_jax.linen import BatchNorm

FlaxBatchNorm = functools.partial(nn.BatchNorm, use_fast_variance=False)
KEY = jax.random.key(0)


class Net(nn.Module):
    norm: Callable

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(16)(x)
        x = self.norm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(1)(nn.relu(x))


def data(n=32, features=8):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, features)).astype(np.float32) + 3
    return x, np.sin(x.sum(1, keepdims=True)).astype(np.float32)


def sgd_step(net, variables, x, target):
    def loss(params):
        y, updates = net.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.mean((y - target) ** 2), updates

    gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], gradients)
    return {"params": params, **updates}


def trained(norm, variables, steps=20):
    net, (x, target) = Net(norm), data()
    step = jax.jit(functools.partial(sgd_step, net))
    for _ in range(steps):
        variables = step(variables, x, target)
    return variables, net.apply(variables, x, train=False)


def assert_trees_close(got, want, tolerance=1e-5):
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, got, want)


def train(module, variables, x, **given):
    return module.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"], **given
    )


def initialised(x=None, **fields):
    module = BatchNorm(**fields)
    return module, module.init(KEY, jnp.ones((4, 3)) if x is None else x, False)


def test_fields_are_those_of_flax():
    def fields(cls):
        inherited = ("parent", "name")
        return [(f.name, f.default) for f in dataclasses.fields(cls) if f.name not in inherited]

    assert fields(BatchNorm)[: len(fields(nn.BatchNorm))] == fields(nn.BatchNorm)


@pytest.mark.parametrize(
    ("x_dtype", "fields"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("float32", {"axis": 1}),
        ("float32", {"axis": (-1, 1)}),
        ("float32", {"axis": [3, 0, 2]}),
        ("float32", {"axis": (0, 1, 2, 3)}),
        ("float32", {"epsilon": 0.5}),
        ("float32", {"use_bias": False}),
        ("float32", {"use_scale": False}),
        ("float32", {"use_bias": False, "use_scale": False}),
        ("float32", {"dtype": jnp.bfloat16}),
        ("float32", {"dtype": jnp.float16, "param_dtype": jnp.bfloat16}),
        ("bfloat16", {"dtype": jnp.float16, "param_dtype": jnp.bfloat16}),
        ("float32", {"param_dtype": jnp.float16}),
        ("bfloat16", {"param_dtype": jnp.float16}),
        (
            "float32",
            {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.constant(2)},
        ),
        ("float32", {"axis_name": "batch", "axis_index_groups": [[0, 1]]}),
    ],
    # Of values that are functions str is an address.
    ids=lambda v: v if isinstance(v, str) else " ".join(v),
)
def test_variables_and_outputs_are_those_of_flax(x_dtype, fields):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4, 5)), x_dtype)
    both = []
    for norm in (BatchNorm, FlaxBatchNorm):
        module = norm(**fields)
        y, variables = module.init_with_output(KEY, x, use_running_average=False)
        evaluated = module.apply(variables, x, use_running_average=True)
        assert evaluated.dtype == y.dtype
        described = jax.tree.map(lambda v: (v.shape, str(v.dtype)), (variables, y))
        both.append((described, jax.tree.map(np.float32, (variables, y, evaluated))))
    (described, values), (flax_described, flax_values) = both
    assert described == flax_described
    half = jnp.dtype(described[1][1]).itemsize == 2
    assert_trees_close(values, flax_values, 1e-2 if half else 1e-5)


@functools.cache
def trained_in_flax():
    return trained(FlaxBatchNorm, Net(FlaxBatchNorm).init(KEY, data()[0], train=True))


def test_trains_like_flax():
    variables = Net(BatchNorm).init(KEY, data()[0], train=True)
    assert_trees_close(trained(BatchNorm, variables), trained_in_flax())


def test_a_flax_checkpoint_restored(tmp_path):
    x, _ = data()
    net, (saved, evaluated) = Net(BatchNorm), trained_in_flax()
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "flax", saved)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(functools.partial(net.init, train=True), KEY, x)
        restored = checkpointer.restore(tmp_path / "flax", like)
    np.testing.assert_array_equal(net.apply(restored, x, train=False), evaluated)
    arguments = {"train": True, "mutable": ["batch_stats"]}
    want = Net(FlaxBatchNorm).apply(saved, x, **arguments)
    assert_trees_close(net.apply(restored, x, **arguments), want, 1e-6)


@pytest.mark.parametrize("is_training", [True, False])
def test_a_flax_checkpoint_has_no_count_for_an_estimator_that_wants_one(is_training):
    net = Net(functools.partial(BatchNorm, estimator=debiased_ema))
    with pytest.raises(ValueError, match="no count in batch_stats for BatchNorm_0"):
        net.apply(trained_in_flax()[0], data()[0], train=is_training, mutable=["batch_stats"])


def test_nothing_need_be_mutable_where_the_statistics_stay():
    x, _ = data()
    module, variables = initialised(x)
    y = module.apply(variables, x, use_running_average=False, update_stats=False)
    np.testing.assert_array_equal(y, train(module, variables, x)[0])


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize(("field", "argument"), [(None, None), (True, True), (False, True)])
def test_mode_in_both_places_or_in_neither_is_refused(norm, field, argument):
    with pytest.raises(ValueError, match="use_running_average"):
        norm(use_running_average=field).init(KEY, jnp.ones((4, 3)), argument)


@pytest.mark.parametrize("use_running_average", [True, False])
@pytest.mark.parametrize("missing", [("mean",), ("var",), ("mean", "var")])
def test_missing_statistics_are_refused(use_running_average, missing):
    module, variables = initialised()
    for name in missing:
        del variables["batch_stats"][name]
    with pytest.raises(ValueError, match="batch_stats"):
        module.apply(variables, jnp.ones((4, 3)), use_running_average, mutable=["batch_stats"])


def test_traced_momentum_and_epsilon():
    x, _ = data()
    _, variables = initialised(x)

    @jax.jit
    def f(momentum, epsilon):
        return train(BatchNorm(momentum=momentum, epsilon=epsilon), variables, x)

    assert_trees_close(
        f(0.3, 0.2), train(BatchNorm(momentum=0.3, epsilon=0.2), variables, x), 1e-6
    )


def test_seeds_vmapped():
    x, _ = data()
    module = BatchNorm(scale_init=nn.initializers.normal())

    def run(key):
        return train(module, module.init(key, x, False), x)

    keys = jax.random.split(KEY, 3)
    stacked = jax.jit(jax.vmap(run))(keys)
    for i in range(3):
        assert_trees_close(jax.tree.map(lambda v, i=i: v[i], stacked), run(keys[i]))
