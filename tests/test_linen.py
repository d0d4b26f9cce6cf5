import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from bn_jax.core.batch_norm import batch_norm, normalize
from bn_jax.core.running import BatchStats, ema
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
    "fields",
    [
        {},
        {"axis": 1},
        {"axis": (-1, 1)},
        {"axis": [3, 0, 2]},
        {"axis": (0, 1, 2, 3)},
        {"epsilon": 0.5},
        {"use_bias": False},
        {"use_scale": False},
        {"use_bias": False, "use_scale": False},
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float16, "param_dtype": jnp.bfloat16},
        {"param_dtype": jnp.float16},
        {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.constant(2)},
        {"axis_name": "batch", "axis_index_groups": [[0, 1]]},
    ],
    ids=lambda fields: " ".join(fields),  # of values that are functions str is an address
)
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_variables_and_outputs_are_those_of_flax(fields, x_dtype):
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


def test_trains_like_flax():
    variables = Net(FlaxBatchNorm).init(KEY, data()[0], train=True)
    flax_variables, flax_y = trained(FlaxBatchNorm, variables)
    assert_trees_close(trained(BatchNorm, variables), (flax_variables, flax_y))
    # A Flax checkpoint, in both modes.
    x, _ = data()
    net, flax_net = Net(BatchNorm), Net(FlaxBatchNorm)
    np.testing.assert_allclose(net.apply(flax_variables, x, train=False), flax_y, 1e-6, 1e-6)
    arguments = {"train": True, "mutable": ["batch_stats"]}
    want = flax_net.apply(flax_variables, x, **arguments)
    assert_trees_close(net.apply(flax_variables, x, **arguments), want)


def test_trains_like_torch():
    torch = pytest.importorskip("torch")
    (x, target), steps = data(), 20
    variables = Net(BatchNorm).init(KEY, x, train=True)
    dense, relu = torch.nn.Linear, torch.nn.ReLU()
    net = torch.nn.Sequential(dense(8, 16), torch.nn.BatchNorm1d(16), relu, dense(16, 1))
    with torch.no_grad():
        for layer, name in [(net[0], "Dense_0"), (net[3], "Dense_1")]:
            given = variables["params"][name]
            layer.weight.copy_(torch.tensor(np.array(given["kernel"].T)))
            layer.bias.copy_(torch.tensor(np.array(given["bias"])))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.mean((net(torch.tensor(x)) - torch.tensor(target)) ** 2).backward()
        optimizer.step()
    variables, _ = trained(BatchNorm, variables, steps)
    stats = variables["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], net[1].running_mean, 1e-5, 1e-5)
    # torch averages n/(n-1) var; both started at 1, of which .9^steps is left.
    rest, n = 0.9**steps, len(x)
    stats["var"] = rest + (stats["var"] - rest) * n / (n - 1)
    np.testing.assert_allclose(stats["var"], net[1].running_var, 1e-5, 1e-5)
    got = Net(BatchNorm).apply(variables, x, train=False)
    np.testing.assert_allclose(got, net.eval()(torch.tensor(x)).detach(), 1e-5, 1e-5)


def test_core_is_torchs_batch_norm_2d():
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(3, momentum=0.2, eps=1e-3)
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(size=(2, 3)).astype(np.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(scale))
        layer.bias.copy_(torch.tensor(bias))
    stats = BatchStats.create((3,))
    given = {"axis": 1, "epsilon": 1e-3}
    for _ in range(4):
        x, dy = (rng.normal(size=(2, 2, 3, 4, 5)) + 5).astype(np.float32)
        x_torch = torch.tensor(x, requires_grad=True)
        layer.zero_grad()
        y_torch = layer(x_torch)
        y_torch.backward(torch.tensor(dy))
        y, vjp, seen = jax.vjp(
            functools.partial(batch_norm, **given), x, scale, bias, has_aux=True
        )
        stats = ema(stats, seen, momentum=0.8, unbiased=True)
        wanted = y_torch.detach(), x_torch.grad, layer.weight.grad, layer.bias.grad
        for got, want in zip((y, *vjp(dy)), wanted, strict=True):
            np.testing.assert_allclose(got, want, 1e-4, 1e-4)
    np.testing.assert_allclose(stats.mean, layer.running_mean, 1e-6, 1e-6)
    np.testing.assert_allclose(stats.var, layer.running_var, 1e-6, 1e-6)
    got = normalize(x, stats.mean, stats.var, scale, bias, **given)
    want = layer.eval()(torch.tensor(x)).detach()
    np.testing.assert_allclose(got, want, 1e-5, 1e-5)


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


@pytest.mark.parametrize("name", ["mean", "var"])
@pytest.mark.parametrize("use_running_average", [True, False])
def test_statistics_of_another_shape_are_refused(name, use_running_average):
    module, variables = initialised()
    variables["batch_stats"][name] = jnp.ones(1)
    with pytest.raises(ValueError, match=rf"{name} of shape \(1,\)"):
        module.apply(variables, jnp.ones((4, 3)), use_running_average, mutable=["batch_stats"])


def test_updates_by_the_formula_and_only_in_training():
    x, _ = data()
    module, variables = initialised(x, momentum=0.7)
    zeros, ones = np.zeros(8, np.float32), np.ones(8, np.float32)
    assert_trees_close(variables["batch_stats"], {"mean": zeros, "var": ones}, 0)
    _, updates = train(module, variables, x)
    seen = reference.moments(x)
    want = {
        "mean": reference.ema(zeros, seen.mean, 0.7, 32),
        "var": reference.ema(ones, seen.var, 0.7, 32),
    }
    assert_trees_close(updates["batch_stats"], want)
    _, updates = module.apply(variables, x, True, mutable=["batch_stats"])
    assert_trees_close(updates["batch_stats"], variables["batch_stats"], 0)


def test_mask():
    x, mask = data()[0], np.arange(32)[:, None] < 20
    module, variables = initialised(x)
    y, updates = train(module, variables, np.where(mask, x, np.nan), mask=mask)
    want, want_updates = train(module, variables, x[:20])
    assert_trees_close((y[:20], updates), (want, want_updates))
    with pytest.raises(ValueError, match="mask"):
        train(module, variables, x[:8], mask=np.ones(8))
    _, updates = train(module, variables, x, mask=np.zeros((32, 1)))
    assert_trees_close(updates["batch_stats"], variables["batch_stats"], 0)


def masked_replicas():
    masks = np.arange(8)[None, :, None] < np.reshape([5, 3, 0, 8], (4, 1, 1))
    return data()[0].reshape(4, 8, 8), masks


@pytest.mark.parametrize("groups", [None, [[0, 3], [1, 2]]])
def test_replicas_share_statistics_weighted_by_their_masks(groups):
    x, masks = masked_replicas()
    module, variables = initialised(x[0], axis_name="batch", axis_index_groups=groups)
    one = functools.partial(train, module, variables)
    y, updates = jax.pmap(lambda x, mask: one(x, mask=mask), axis_name="batch")(x, masks)
    for group in groups or [[0, 1, 2, 3]]:
        together, mask = x[group].reshape(-1, 8), masks[group].reshape(-1, 1)
        want_y, want = train(BatchNorm(), variables, together, mask=mask)
        np.testing.assert_allclose(y[np.array(group)].reshape(-1, 8), want_y, 1e-5, 1e-5)
        for i in group:
            assert_trees_close(jax.tree.map(lambda v, i=i: v[i], updates), want)


def test_vmapped_replicas_leave_one_set_of_statistics():
    x, masks = masked_replicas()
    module, variables = initialised(x[0], axis_name="batch")
    one = functools.partial(train, module, variables)
    # out_axes=None is refused of what vmap takes for a value of each replica.
    mapped = jax.vmap(lambda x, m: one(x, mask=m), axis_name="batch", out_axes=(0, None))
    y, updates = mapped(x, masks)
    x, masks = x.reshape(-1, 8), masks.reshape(-1, 1)
    assert_trees_close(
        (y.reshape(-1, 8), updates), train(BatchNorm(), variables, x, mask=masks)
    )


def test_bfloat16_costs_the_statistics_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (512, 4)), jnp.bfloat16)
    module, variables = initialised(x, dtype=jnp.bfloat16, momentum=0.0)
    y, updates = train(module, variables, x)
    seen = reference.moments(np.float64(x))
    assert y.dtype == jnp.bfloat16
    assert updates["batch_stats"]["mean"].dtype == jnp.float32
    want = {"mean": seen.mean, "var": seen.var}
    assert_trees_close(updates["batch_stats"], want, 1e-6)


def test_float64_input_leaves_the_statistics_float32(x64):
    x = np.float64(data()[0])
    module, variables = initialised(x)
    y, updates = train(module, variables, x)
    assert y.dtype == jnp.float64
    assert {v.dtype for v in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


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
    x, target = data()
    net = Net(BatchNorm)

    @jax.jit
    def run(key):
        return sgd_step(net, net.init(key, x, train=True), x, target)

    keys = jax.random.split(KEY, 3)
    stacked = jax.vmap(run)(keys)
    for i in range(3):
        assert_trees_close(jax.tree.map(lambda v, i=i: v[i], stacked), run(keys[i]))


def test_steps_scanned():
    x, target = data()
    net = Net(BatchNorm)
    variables = net.init(KEY, x, train=True)

    @jax.jit
    def run(variables):
        def step(variables, _):
            return sgd_step(net, variables, x, target), None

        return jax.lax.scan(step, variables, length=20)[0]

    assert_trees_close(run(variables), trained(BatchNorm, variables)[0])


def test_remat_moves_the_statistics_once():
    x, target = data()
    variables = Net(BatchNorm).init(KEY, x, train=True)
    name = "CheckpointBatchNorm_0"
    renamed = {
        kind: {name if key == "BatchNorm_0" else key: v for key, v in tree.items()}
        for kind, tree in variables.items()
    }
    got = jax.jit(functools.partial(sgd_step, Net(nn.remat(BatchNorm))))(renamed, x, target)
    want = sgd_step(Net(BatchNorm), variables, x, target)
    assert_trees_close(got["batch_stats"][name], want["batch_stats"]["BatchNorm_0"])
    assert_trees_close(got["params"][name], want["params"]["BatchNorm_0"])
    assert_trees_close(got["params"]["Dense_0"], want["params"]["Dense_0"])
