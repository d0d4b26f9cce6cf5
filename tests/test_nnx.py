"""What is NNX's alone: the place of `flax.nnx.BatchNorm` is taken in every way it is used."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bn_jax.nnx import BatchNorm, BatchRenorm, GhostBatchNorm

FlaxBatchNorm = functools.partial(nnx.BatchNorm, use_fast_variance=False)
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(16, 8)) + 3)
TARGET = np.sin(X.sum(1, keepdims=True))
OURS = [BatchNorm, GhostBatchNorm, BatchRenorm]
BOTH = [BatchNorm, FlaxBatchNorm]


def make(norm, features=8, **fields):
    return norm(features, rngs=nnx.Rngs(0), **fields)


def arrays(node):
    return nnx.to_pure_dict(nnx.state(node))


def assert_trees_close(got, want, tolerance=1e-5):
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, got, want)


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = norm(16, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


@nnx.jit
def step(net, optimizer, x, target):
    def loss(net):
        return jnp.mean((net(x) - target) ** 2)

    optimizer.update(net, nnx.grad(loss)(net))


def trained(norm, steps=20):
    net = Net(norm, nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.sgd(0.05), wrt=nnx.Param)
    net.train()
    for _ in range(steps):
        step(net, optimizer, X, TARGET)
    return net


@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_arguments_are_those_of_flax(method):
    def arguments(cls):
        return list(inspect.signature(getattr(cls, method)).parameters.values())

    def described(parameter):
        return parameter.name, parameter.kind, parameter.default

    theirs = list(map(described, arguments(nnx.BatchNorm)))
    assert list(map(described, arguments(BatchNorm)))[: len(theirs)] == theirs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"axis": 1},
        {"epsilon": 0.5, "momentum": 0.5},
        {"use_bias": False},
        {"use_scale": False, "use_bias": False},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"scale_init": nnx.initializers.normal(), "bias_init": nnx.initializers.constant(2)},
        {"scale_metadata": {"tag": "a"}, "bias_metadata": {"tag": "b"}},
        {"promote_dtype": nnx.nn.dtypes.promote_dtype},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_variables_and_outputs_are_those_of_flax(fields):
    x = np.float32(RNG.normal(size=(2, 8, 8)))
    both = []
    for norm in BOTH:
        layer = make(norm, **fields)
        described = [
            (path, type(v), v.shape, v.dtype, v.get_metadata())
            for path, v in nnx.to_flat_state(nnx.state(layer))
        ]
        y, evaluated = layer(x), layer(x, use_running_average=True)
        described += [y.dtype, evaluated.dtype]
        both.append((described, jax.tree.map(np.float32, (arrays(layer), y, evaluated))))
    (described, values), (flax_described, flax_values) = both
    assert described == flax_described
    assert_trees_close(values, flax_values, 1e-2 if "dtype" in fields else 1e-5)


def test_trains_like_flax():
    net, flax_net = trained(BatchNorm), trained(FlaxBatchNorm)
    assert_trees_close(arrays(net), arrays(flax_net))
    # The state of Flax's network, in both modes.
    nnx.update(net, nnx.state(flax_net))
    for mode in ("eval", "train"):
        getattr(net, mode)()
        getattr(flax_net, mode)()
        np.testing.assert_allclose(net(X), flax_net(X), 1e-6, 1e-6)
    assert_trees_close(arrays(net), arrays(flax_net), 1e-6)


def in_mode(how, layer, average):
    """The layer, in a mode that was set in one of the ways NNX has."""
    if how == "train, eval":
        layer.eval() if average else layer.train()
    elif how == "set_attributes":
        layer.set_attributes(use_running_average=average)
    elif how == "view":
        return nnx.view(layer, use_running_average=average)
    return layer


@pytest.mark.parametrize("norm", [*OURS, FlaxBatchNorm])
@pytest.mark.parametrize("how", ["train, eval", "set_attributes", "view", "call"])
@pytest.mark.parametrize("average", [True, False])
def test_modes(norm, how, average):
    layer = in_mode(how, make(norm, use_running_average=not average), average)
    before = jax.tree.map(np.array, arrays(layer))
    # The call precedes the attribute.
    y = layer(X, use_running_average=average) if how == "call" else layer(X)
    running = (X - before["mean"].reshape(1, 8)) / np.sqrt(1 + 1e-5)
    batch = (X - X.mean(0, keepdims=True)) / X.std(0, keepdims=True)
    np.testing.assert_allclose(y, running if average else batch, 1e-4, 1e-4)
    assert np.all(layer.mean[...] == before["mean"]) == average


@pytest.mark.parametrize("norm", BOTH)
def test_no_mode_is_refused(norm):
    with pytest.raises(ValueError, match="use_running_average"):
        make(norm, use_running_average=None)(X)


@pytest.mark.parametrize("norm", BOTH)
def test_view_info_lists_the_mode(norm):
    assert "use_running_average: bool | None = None" in nnx.view_info(make(norm))


@pytest.mark.parametrize("norm", [*OURS, FlaxBatchNorm])
def test_split_merge_and_clone(norm):
    layer = make(norm, momentum=0.5)
    layer(X)
    copies = nnx.merge(*nnx.split(layer), copy=True), nnx.clone(layer)
    want = layer(2 * X), layer(X, use_running_average=True), arrays(layer)
    for copy in copies:
        got = copy(2 * X), copy(X, use_running_average=True), arrays(copy)
        assert_trees_close(got, want, 0)


@pytest.mark.parametrize("norm", [*OURS, FlaxBatchNorm])
def test_construction_may_be_traced(norm):
    want = make(norm)
    abstract = nnx.eval_shape(functools.partial(make, norm))
    assert jax.tree.map(jnp.shape, arrays(abstract)) == jax.tree.map(jnp.shape, arrays(want))
    assert_trees_close(arrays(nnx.jit(functools.partial(make, norm))()), arrays(want), 0)


def test_several_feature_axes():
    x = X.reshape(4, 4, 2, 4)
    layer, flat = make(BatchNorm, (4, 4), axis=(1, -1)), make(BatchNorm, 16)
    y = layer(x)
    want = flat(x.transpose(0, 2, 1, 3).reshape(8, 16))
    np.testing.assert_allclose(y, want.reshape(4, 2, 4, 4).transpose(0, 2, 1, 3), 1e-6, 1e-6)
    assert_trees_close(arrays(layer), jax.tree.map(lambda v: v.reshape(4, 4), arrays(flat)))


def test_ensembles_vmapped():
    build = functools.partial(BatchNorm, 8, scale_init=nnx.initializers.normal())
    ensemble = nnx.vmap(lambda rngs: build(rngs=rngs))(nnx.Rngs(0).split(3))
    graph, state = nnx.split(ensemble)
    members = [nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i], state)) for i in range(3)]
    xs = [X, 2 * X, X - 5]
    y = nnx.vmap(lambda layer, x: layer(x))(ensemble, jnp.stack(xs))
    for i, (member, x) in enumerate(zip(members, xs, strict=True)):
        assert_trees_close(y[i], member(x))
        assert_trees_close(jax.tree.map(lambda v, i=i: v[i], arrays(ensemble)), arrays(member))


def test_remat_moves_the_statistics_once():
    def differentiated(call):
        layer = make(BatchNorm)
        gradient = nnx.grad(lambda layer, x: jnp.sum(jnp.sin(call(layer, x))))(layer, X)
        return arrays(layer), arrays(gradient)

    assert_trees_close(
        differentiated(nnx.remat(lambda layer, x: layer(x))),
        differentiated(lambda layer, x: layer(x)),
    )


@pytest.mark.parametrize("norm", OURS)
def test_steps_scanned(norm):
    scanned, looped, xs = make(norm), make(norm), np.stack([X, 2 * X, X - 5])
    axes = nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None})
    y = nnx.scan(lambda layer, x: layer(x), in_axes=(axes, 0), out_axes=0)(scanned, xs)
    assert_trees_close(y, jnp.stack([looped(x) for x in xs]))
    assert_trees_close(arrays(scanned), arrays(looped))
