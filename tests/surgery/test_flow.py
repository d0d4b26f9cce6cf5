import functools
import os
from collections import Counter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Layer, chain, norm, output, with_variables

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import fold, recalibrate
from bn_jax.surgery.flow import trace
from bn_jax.surgery.intercept import apply, intercept
from bn_jax.surgery.layers import layer_paths

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
OTHER = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
BatchNorm = functools.partial(bn_jax.linen.BatchNorm, use_running_average=True)
both_homes = pytest.mark.parametrize("home", ["linen", "nnx"])


def same(model, variables, folded, *inputs, tolerance=1e-5, **call):
    want = output(model, variables, *inputs, **call)
    got = output(folded.model, folded.variables, *inputs, **call)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def compact(function):
    """A Linen model out of what it does; layers are made in the call."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, *inputs, **call):
            return function(*inputs, **call)

    return Model()


def in_nnx(layers, function):
    """An NNX model out of its layers, made without arguments, and of what it does."""

    class Model(nnx.Module):
        def __init__(self):
            for name, layer in layers().items():
                setattr(self, name, layer)

        def __call__(self, *inputs):
            return function(self, *inputs)

    return Model


def two_layers():
    rngs = nnx.Rngs(0)
    norms = functools.partial(bn_jax.nnx.BatchNorm, 4, use_running_average=True, rngs=rngs)
    dense = functools.partial(nnx.Linear, 4, 4, rngs=rngs)
    return {"a": dense(), "b": dense(), "n": norms(), "m": norms()}


def refused(model, variables, *inputs, **call):
    """The reasons, of a model of which nothing can be folded and so nothing changes."""
    folded = fold(model, variables, *inputs, **call)
    assert folded.pairs == []
    assert jax.tree.structure(folded.variables) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, folded.variables, variables)
    same(model, variables, folded, *inputs, **call)
    return folded.refused


def of_linen(function, *inputs, **call):
    inputs = inputs or (X,)
    return refused(*with_variables(compact(function), *inputs, **call), *inputs, **call)


def with_residual(x):
    h = nn.Dense(4)(x)
    return nn.relu(BatchNorm()(h)) + h


def with_output(x):
    h = nn.Dense(4)(x)
    return {"h": h, "y": nn.relu(BatchNorm()(h))}


def of_two(x):
    h = nn.Dense(4)(x)
    return nn.relu(BatchNorm()(h)) + nn.relu(nn.Dense(4)(h))


def layer_twice(x):
    dense = nn.Dense(4)
    return nn.relu(BatchNorm()(dense(x))) + nn.relu(dense(2 * x))


def norm_twice(x):
    norms = BatchNorm()
    return nn.relu(norms(nn.Dense(4)(x))) + nn.relu(norms(nn.Dense(4)(x)))


def after_twice(x):
    dense = nn.Dense(4)
    return dense(BatchNorm()(x)) + nn.relu(dense(x))


def one_norm_two_layers(x):
    h = BatchNorm()(x)
    return nn.Dense(4)(h) + nn.Dense(4)(h)


def scanned(x):
    """Dense and BatchNorm inside a scan, once for each of two parameters."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return BatchNorm()(nn.Dense(4)(x)), None

    lifted = nn.scan(
        Body,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=2,
    )
    return lifted()(x, None)[0]


def vmapped(x):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BatchNorm()(nn.Dense(4)(x))

    axes = {"params": 0, "batch_stats": 0}
    lifted = nn.vmap(
        Body, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=2
    )
    return lifted()(x)


def vmapped_norm(layer, axis, x):
    """Copies of a BatchNorm over an axis of what one layer before them returns."""
    lifted = nn.vmap(
        bn_jax.linen.BatchNorm,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=axis,
        out_axes=axis,
    )
    return lifted(use_running_average=True)(layer(jnp.stack([x] * 3)))


def batched(x):
    return BatchNorm(axis=(0, -1))(nn.DenseGeneral(4, batch_dims=(0,))(x))


def within_reason(x):
    return BatchNorm()(nn.tanh(nn.Dense(4)(x)))


def in_the_call(x):
    h = nn.Dense(4)(x)
    return BatchNorm(use_scale=False)(h, scale=2 * jnp.ones(4))


def both_in_the_call(x):
    norms = BatchNorm(use_scale=False, use_bias=False)
    return norms(nn.Dense(4)(x), scale=jnp.ones(4), bias=jnp.ones(4))


def rounded(x):
    return BatchNorm()(nn.Dense(4)(x).astype(jnp.bfloat16).astype(jnp.float32))


def sliced(x):
    return BatchNorm()(nn.Dense(5)(x)[:, :4])


REFUSED = {
    "residual": (with_residual, "add"),
    "model's output": (with_output, "the model's output"),
    "another layer": (of_two, "Dense_1"),
    "layer twice": (layer_twice, "Dense_0 is called 2 times"),
    "norm twice": (norm_twice, "BatchNorm_0 is called 2 times"),
    "layer after twice": (after_twice, "Dense_0 is called 2 times"),
    "two layers after": (one_norm_two_layers, "Dense_0, Dense_1"),
    "activation": (within_reason, "its input comes from tanh"),
    "scan": (scanned, ""),
    "vmap": (vmapped, "vmap"),
    "vmap of the norm": (lambda x: vmapped_norm(nn.DenseGeneral((2, 4)), 2, x), ""),
    "vmap of the norm over examples": (lambda x: vmapped_norm(nn.Dense(4), 0, x), ""),
    "batch axes": (batched, "batch axes"),
    "scale": (in_the_call, "its scale come"),
    "scale and bias": (both_in_the_call, "its scale and bias come"),
    "cast": (rounded, "convert_element_type"),
    "slice": (sliced, "slice"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(function, reason):
    (said,) = of_linen(function).values()
    assert reason in said


def in_scan(s, x):
    return jax.lax.scan(lambda h, _: (s.n(s.a(h)), None), x, length=2)[0]


# The BatchNorm n, and the layer a before it.
REFUSED_IN_NNX = {
    "branch": (lambda s, x: jax.lax.cond(x[0, 0, 0] > 0, s.n, lambda h: -h, s.a(x)), "branch"),
    "loop": (in_scan, "loop"),
    "map": (lambda s, x: jax.lax.map(s.n, s.a(x)), "loop"),
    "layer in a loop": (lambda s, x: s.n(jax.lax.map(s.a, x)), "scan"),
    "vmap over features": (lambda s, x: jax.vmap(s.n, in_axes=2, out_axes=2)(s.a(x)), ""),
    "transposed": (lambda s, x: s.n(s.a(x).swapaxes(1, 2)), "transpose"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED_IN_NNX.values(), ids=REFUSED_IN_NNX)
def test_refused_in_nnx(function, reason):
    x = jnp.asarray(RNG.normal(size=(3, 4, 4)), jnp.float32)
    (said,) = refused(*with_variables(in_nnx(two_layers, function)), x).values()
    assert reason in said


def test_a_vmap_over_examples_is_no_obstacle():
    model, variables = with_variables(
        in_nnx(two_layers, lambda s, x: jax.vmap(s.n)(jax.vmap(s.a)(x)))
    )
    x = jnp.asarray(RNG.normal(size=(3, 2, 4)), jnp.float32)
    folded = fold(model, variables, x)
    assert folded.pairs == [(("n",), ("a",), "before")]
    same(model, variables, folded, 1 - 2 * x)


@both_homes
def test_statistics_of_the_batch_are_refused(home):
    layers = Layer("Dense", (5,)), norm(use_running_average=False)
    model, variables, paths = chain(home, X, *layers)
    if home == "nnx":
        reasons = refused(model, variables, X)
    else:
        folded = fold(compact_train(), variables_of_train(), X, train=True)
        assert folded.pairs == []
        reasons, paths = folded.refused, [None, ("BatchNorm_0",)]
    assert "statistics of the batch" in reasons[paths[1]]


def compact_train():
    def function(x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))

    return compact(function)


def variables_of_train():
    return with_variables(compact_train(), X, train=False)[1]


BESIDE = {
    "transposed": (norm(), Layer("ConvTranspose", (5, (3,)), {"padding": "VALID"})),
    "zeros between": (
        norm(),
        Layer("Conv", (5, (3,)), {"input_dilation": 2, "padding": 0}),
    ),
    "mask": (
        norm(),
        Layer("Conv", (4, (1,)), {"mask": np.float32(np.triu(np.ones((1, 4, 4))))}),
    ),
    "axis": (Layer("Dense", (4,)), norm(axis=-2)),
    "both axes": (Layer("Dense", (4,)), norm(axis=(-2, -1))),
    "axis, convolution": (Layer("Conv", (4, (3,))), norm(axis=-2)),
    "axis, the layer after": (norm(axis=-2), Layer("Dense", (4,))),
    "max-pool": (
        norm(),
        Layer(lambda x: nn.max_pool(x, (2,))),
        Layer("Conv", (5, (1,)), {"padding": "VALID"}),
    ),
}
BECAUSE = {
    "transposed": "is transposed",
    "zeros between": "zeros between",
    "mask": "has a mask",
    "max-pool": "reduce_window",
}


@both_homes
@pytest.mark.parametrize("case", BESIDE)
def test_refused_beside_another_layer(home, case):
    x = jnp.asarray(RNG.normal(size=(3, 4, 4)), jnp.float32)
    model, variables, _ = chain(home, x, *BESIDE[case])
    (reason,) = refused(model, variables, x).values()
    assert BECAUSE.get(case, "does not have the BatchNorm's axis") in reason


def test_every_reason_is_the_norms_own():
    """JAX writes out a function that is called twice, relu here, only once."""

    def function(x):
        for _ in range(3):
            x = nn.Dense(4)(x)
            x = BatchNorm()(jax.nn.relu(x))
            x = nn.softmax(x)
        return x

    reasons = list(of_linen(function).values())
    assert len(reasons) == 3
    for reason in reasons:
        assert "its input comes from relu" in reason
        assert "too" not in reason


def test_a_value_that_is_kept_is_used():
    def function(x):
        class Keeping(nn.Module):
            @nn.compact
            def __call__(self, x):
                h = nn.Dense(4)(x)
                kept = self.variable("cache", "h", lambda: jnp.zeros_like(h))
                kept.value = h
                return BatchNorm()(h)

        return Keeping()(x)

    model, variables = with_variables(compact(function), X)
    folded = fold(model, variables, X)
    want = model.apply(variables, X, mutable="cache")[1]
    got = folded.model.apply(folded.variables, X, mutable="cache")[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_kernels_that_are_made_from_others_are_not_silently_wrong(wrapper):
    def function(x):
        given = {"update_stats": False} if wrapper is nn.SpectralNorm else {}
        return nn.relu(BatchNorm()(wrapper(nn.Dense(5))(x, **given)))

    model, variables = with_variables(compact(function), X)
    try:
        folded = fold(model, variables, X)
    except ValueError:
        return
    same(model, variables, folded, OTHER)


def tied(first):
    """One kernel in two layers, of which either is before the BatchNorm."""

    def layers():
        made = two_layers()
        made["b"].kernel = made["a"].kernel
        return made

    def function(self, x):
        if first:
            return self.b(nnx.relu(self.n(self.a(x))))
        return self.n(self.b(nnx.relu(self.a(x))))

    return in_nnx(layers, function)


@pytest.mark.parametrize("first", [True, False])
def test_a_kernel_in_two_places_is_refused(first):
    """Linen's and NNX's: NNX has it at one of its paths only."""
    model, variables = with_variables(tied(first))
    if not first:
        assert "has its kernel in common" in str(refused(model, variables, X))
        return
    with pytest.raises(ValueError, match="kernel used in two places"):
        fold(model, variables, X)


def test_a_kernel_in_two_places_of_linen_is_refused():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4)
            h = nn.relu(BatchNorm()(dense(x)))
            return h @ dense.variables["params"]["kernel"]

    model, variables = with_variables(Tied(), X)
    with pytest.raises(ValueError, match="kernel used in two places"):
        fold(model, variables, X)


CACHED = {"nnx.jit": nnx.jit(lambda layer, x: layer(x)), "jax.jit": None}


@pytest.mark.parametrize("jit", CACHED)
def test_a_norm_that_runs_twice_but_is_traced_once(jit):
    def function(self, x):
        call = CACHED[jit]
        if jit == "jax.jit":
            inner = jax.jit(lambda x: self.n(x))
            return inner(self.a(x)) + inner(self.b(x))
        return call(self.n, self.a(x)) + call(self.n, self.b(x))

    model, variables = with_variables(in_nnx(two_layers, function))
    assert refused(model, variables, X).keys() == {("n",)}


# Ways to write the same: Dense, BatchNorm, relu, twice.
class Block(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.relu(BatchNorm()(nn.Dense(self.features)(x)))


Rematted, Jitted = nn.remat(Block), nn.jit(Block)


class InSetup(nn.Module):
    def setup(self):
        # In another order than that of the calls, and by misleading names.
        self.dense = [BatchNorm(), nn.Dense(4)]
        self.norms = {"one": BatchNorm(), "two": nn.Dense(5)}

    def __call__(self, x):
        x = nn.relu(self.dense[0](self.dense[1](x)))
        return nn.relu(self.norms["one"](self.norms["two"](x)))


class Holder(nn.Module):
    """Submodules that are attributes, one inside a tuple."""

    first: nn.Module
    others: Any

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.others[0](self.first(x)))
        return nn.relu(self.others[2](self.others[1](x)))


class Sharing(nn.Module):
    features: int

    def setup(self):
        self.base = nn.Dense(self.features)
        nn.share_scope(self, self.base)

    def __call__(self, x):
        return self.base(x)


class Methods(nn.Module):
    def setup(self):
        self.block = InSetup()

    def first(self, x):
        return nn.relu(self.block.dense[0](self.block.dense[1](x)))

    def __call__(self, x):
        x = self.first(x)
        return nn.relu(self.block.norms["one"](self.block.norms["two"](x)))


def blocks(first, second):
    def function(x):
        return second()(first()(x))

    return compact(function)


def sharing(x):
    for features in (4, 5):
        x = nn.relu(BatchNorm()(Sharing(features)(x)))
    return x


def nested(x):
    """The jitted functions of others around the calls of the layers."""
    for _ in range(2):
        dense, norms = nn.Dense(4), BatchNorm()
        h = dense(x)
        x = jax.jit(lambda h, norms=norms: nn.relu(norms(h)))(h)
    return x


WRITTEN = {
    "compact": blocks(Block, functools.partial(Block, 5)),
    "setup": InSetup(),
    "attributes": Holder(nn.Dense(4), (BatchNorm(), nn.Dense(5), BatchNorm())),
    "sequential": nn.Sequential([nn.Sequential([nn.Dense(4), BatchNorm(), nn.relu]), Block()]),
    "methods": Methods(),
    "named": InSetup(name="model"),
    "remat": blocks(Rematted, Rematted),
    "jit": blocks(Jitted, functools.partial(Jitted, 5)),
    "jit twice alike": blocks(Jitted, Jitted),
    "share_scope": compact(sharing),
    "jax.jit": compact(nested),
}


@pytest.mark.parametrize("model", WRITTEN.values(), ids=WRITTEN)
def test_ways_to_write_a_linen_model(model):
    """Twice: what the first time left in the caches of jit does not matter."""
    model, variables = with_variables(model, X)
    output(model, variables, X)
    for _ in range(2):
        folded = fold(model, variables, X)
        assert [pair.side for pair in folded.pairs] == ["before"] * 2
        assert "batch_stats" not in folded.variables
        same(model, variables, folded, OTHER)


def in_list():
    layers = two_layers()
    return {
        "z": nnx.List([layers["n"], layers["a"]]),
        "y": nnx.List([layers["b"], layers["m"]]),
    }


def in_dict():
    layers = two_layers()
    return {"all": nnx.Dict(layers), "first": layers["m"]}


def shared():
    """Both pairs are at two places each, and called by the one that is not the first."""
    layers = two_layers()
    first, second = nnx.List([layers["a"], layers["n"]]), nnx.Dict(p=layers["b"], q=layers["m"])
    return {"x": first, "y": nnx.Dict(r=first, s=second), "b": second} | layers


def sequences():
    layers = two_layers()
    block = nnx.Sequential(layers["a"], layers["n"], nnx.relu)
    return {"all": nnx.Sequential(block, layers["b"], layers["m"])}


def pair(layer, norms, x):
    return nnx.relu(norms(layer(x)))


JITTED, REMATTED = nnx.jit(pair), nnx.remat(pair)
NNX_WRITTEN = {
    "attributes": (two_layers, lambda s, x: pair(s.b, s.m, pair(s.a, s.n, x))),
    "list": (in_list, lambda s, x: pair(s.y[0], s.y[1], pair(s.z[1], s.z[0], x))),
    "dict": (in_dict, lambda s, x: pair(s.all["b"], s.first, pair(s.all.a, s.all.n, x))),
    "shared": (shared, lambda s, x: pair(s.y.s.p, s.m, pair(s.x[0], s.y.r[1], x))),
    "sequential": (sequences, lambda s, x: s.all(x)),
    "jit": (two_layers, lambda s, x: JITTED(s.b, s.m, JITTED(s.a, s.n, x))),
    "remat": (two_layers, lambda s, x: REMATTED(s.b, s.m, REMATTED(s.a, s.n, x))),
}


@pytest.mark.parametrize(("layers", "function"), NNX_WRITTEN.values(), ids=NNX_WRITTEN)
def test_ways_to_write_an_nnx_model(layers, function):
    model, variables = with_variables(in_nnx(layers, function))
    output(model, variables, X)
    for _ in range(2):
        folded = fold(model, variables, X)
        assert [pair.side for pair in folded.pairs] == ["before"] * 2
        assert not jax.tree.leaves(nnx.filter_state(folded.variables, nnx.BatchStat))
        same(model, variables, folded, OTHER)


def test_an_nnx_scan_over_layers_is_refused():
    class Body(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.norm = bn_jax.nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.vmap(Body)(nnx.Rngs(0).split(2))

        def __call__(self, x):
            axes = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
            return nnx.scan(lambda x, layer: layer(x), **axes)(x, self.layers)

    graphdef, state = nnx.split(Model())
    assert len(refused(graphdef, state, X)) == 1


# Graphs of layers, of which the answer is known from their description.
class Node(NamedTuple):
    """What an operation takes: -1 is the model's input; a layer of a name is one layer."""

    op: str
    inputs: tuple[int, ...]
    name: str


@st.composite
def graphs(draw):
    nodes = []
    for i in range(draw(st.integers(2, 7))):
        op = draw(st.sampled_from(["dense", "norm", "dense", "norm", "relu", "add"]))
        source = st.sampled_from([i - 1, i - 1, i - 1, *range(-1, i)])
        inputs = tuple(draw(source) for _ in range(2 if op == "add" else 1))
        nodes.append(Node(op, inputs, f"{op}{draw(st.sampled_from([i, i, i, 0]))}"))
    return tuple(nodes)


def run(nodes, layers, x):
    """The values that nothing takes."""
    values, taken = {-1: x}, set()
    for i, node in enumerate(nodes):
        taken |= set(node.inputs)
        given = [values[j] for j in node.inputs]
        values[i] = layers[node.name](*given)
    return [v for i, v in values.items() if i not in taken]


def answer(nodes):
    """Pairs, and who is refused."""
    times = Counter(node.name for node in nodes)
    users = {
        i: [j for j, n in enumerate(nodes) for k in n.inputs if k == i] for i in range(-1, 9)
    }
    pairs, left = set(), set()
    for i, node in enumerate(nodes):
        if node.op != "norm":
            continue
        source, sinks = node.inputs[0], users[i]
        if times[node.name] > 1:
            left.add(node.name)
        elif source >= 0 and _absorbs(nodes[source], times) and users[source] == [i]:
            pairs.add((node.name, nodes[source].name, "before"))
        elif len(sinks) == 1 and _absorbs(nodes[sinks[0]], times):
            pairs.add((node.name, nodes[sinks[0]].name, "after"))
        else:
            left.add(node.name)
    return pairs, left


def _absorbs(node, times):
    return node.op == "dense" and times[node.name] == 1


class LinenGraph(nn.Module):
    nodes: tuple

    @nn.compact
    def __call__(self, x):
        makers = {"dense": functools.partial(nn.Dense, 4), "norm": BatchNorm}
        functions = {"relu": nn.relu, "add": lambda a, b: a + b}
        layers = {}
        for name, op in sorted({node.name: node.op for node in self.nodes}.items()):
            layers[name] = makers[op](name=name) if op in makers else functions[op]
        return run(self.nodes, layers, x)


def nnx_graph(nodes):
    class Graph(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            norms = functools.partial(nnx.BatchNorm, 4, use_running_average=True, rngs=rngs)
            make = {"dense": lambda: nnx.Linear(4, 4, rngs=rngs), "norm": norms}
            names = {node.name: node.op for node in nodes if node.op in make}
            self.layers = nnx.Dict({name: make[op]() for name, op in names.items()})

        def __call__(self, x):
            functions = {n.name: nnx.relu if n.op == "relu" else jnp.add for n in nodes}
            return run(nodes, {n: self.layers.get(n, functions[n]) for n in functions}, x)

    return Graph


@both_homes
def test_graphs_of_layers(home):
    @settings(max_examples=30, deadline=None, derandomize="CI" in os.environ)
    @given(nodes=graphs())
    def holds(nodes):
        model = LinenGraph(nodes) if home == "linen" else nnx_graph(nodes)
        model, variables = with_variables(model, X)
        folded = fold(model, variables, X)
        pairs, left = answer(nodes)
        assert {(p.norm[-1], p.layer[-1], p.side) for p in folded.pairs} == pairs
        assert {path[-1] for path in folded.refused} == left
        same(model, variables, folded, OTHER, tolerance=1e-4)

    holds()


def test_what_the_flow_says():
    def function(x):
        x = BatchNorm(name="zero")(x)
        x = nn.Dense(5, name="a")(x)
        x = BatchNorm(name="one", dtype=jnp.bfloat16)(x)
        return nn.relu(x)

    model, variables = with_variables(compact(function), X)
    flow = trace(model, variables, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert list(flow.calls) == [("zero",), ("a",), ("one",)]
    assert [call.x.shape for call in flow.calls.values()] == [(3, 4), (3, 4), (3, 5)]
    assert flow.outputs[("one",)].dtype == jnp.bfloat16
    assert flow.before == {("zero",): flow.before[("zero",)], ("one",): ("a",)}
    assert flow.after == {("zero",): ("a",), ("one",): flow.after[("one",)]}
    assert "the model's input" in flow.before[("zero",)]
    assert "relu" in flow.after[("one",)]


# The hooks themselves.
def doubled(call):
    return 2 * call.proceed()


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_two_layers_of_a_class_have_a_hook_each():
    def hook(call):
        return call.proceed() * {("n",): 10, ("m",): 100}[call.path]

    model, variables = with_variables(in_nnx(two_layers, lambda s, x: (s.n(x), s.m(x))))
    n, m = output(intercept(model, variables, hook), variables, X)
    want = output(model, variables, X)
    assert_equal((n, m), (10 * want[0], 100 * want[1]))


def test_a_shared_layer_is_called_by_one_path():
    paths = []

    def hook(call):
        paths.append(call.path)
        return call.proceed()

    model, variables = with_variables(in_nnx(shared, lambda s, x: s.y.r[1](x) + s.x[1](x)))
    output(intercept(model, variables, hook), variables, X)
    flat = {path[:-1] for path, _ in nnx.to_flat_state(variables)}
    assert len(set(paths)) == 1
    assert set(paths) <= flat
    assert layer_paths(model, variables, X) == paths[:1]


@both_homes
def test_hooks_on_hooks(home):
    """The first is the outermost: what it makes of the call is what the second is given."""
    model, variables, _ = chain(home, X, Layer("Dense", (5,)), norm(), Layer(nn.relu), norm())
    once = intercept(model, variables, doubled)
    twice = intercept(once, variables, lambda call: 1 + call.proceed())
    ours = [lambda v: 2 * (v + 1)] * 2
    layers = iter(ours)

    def reference(call):
        return next(layers)(call.proceed())

    want = output(intercept(model, variables, reference), variables, X)
    assert_equal(output(twice, variables, X), want)


@both_homes
def test_the_callers_objects_stay_as_they_are(home):
    model, variables, _ = chain(home, X, Layer("Dense", (5,)), norm())
    before, want = jax.tree.map(np.array, variables), output(model, variables, X)
    hooked = intercept(model, variables, doubled)
    assert_equal(output(hooked, variables, X), 2 * want)
    assert_equal(output(model, variables, X), want)
    assert_equal(variables, before)
    assert jax.tree.structure(before) == jax.tree.structure(variables)
    assert_equal(apply(hooked, variables, X), 2 * want)


def test_an_nnx_module_of_the_caller_keeps_its_class():
    module = nnx.Sequential(nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    hooked = nnx.merge(intercept(graphdef, state, doubled), state)
    assert type(module.layers[0]) is nnx.BatchNorm
    assert type(nnx.merge(graphdef, state).layers[0]) is nnx.BatchNorm
    assert isinstance(hooked.layers[0], nnx.BatchNorm)
    assert jax.tree.structure(nnx.state(hooked)) == jax.tree.structure(state)


@pytest.mark.parametrize("norms", [nnx.BatchNorm, bn_jax.nnx.BatchNorm, nn.BatchNorm, None])
def test_a_model_that_is_a_norm(norms):
    if norms in (nn.BatchNorm, None):
        layer = (norms or bn_jax.linen.BatchNorm)(use_running_average=True)
        model, variables = with_variables(layer, X)
    else:
        model, variables = with_variables(
            lambda: norms(4, use_running_average=True, rngs=nnx.Rngs(0))
        )
    assert_equal(
        output(intercept(model, variables, doubled), variables, X),
        2 * output(model, variables, X),
    )
    assert layer_paths(model, variables, X) == [()]
    assert refused(model, variables, X).keys() == {()}


@both_homes
def test_a_returned_model_is_traced_once(home):
    """It is its own key in the cache of jit."""
    model, variables, _ = chain(home, X, Layer("Dense", (5,)), norm())
    folded = fold(model, variables, X)
    hooked = intercept(model, variables, doubled)
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def predict(model, variables, x):
        traces.append(model)
        return output(model, variables, x)

    for x in (X, OTHER):
        same(model, variables, folded, x)
        np.testing.assert_allclose(
            predict(hooked, variables, x),
            2 * predict(folded.model, folded.variables, x),
            rtol=1e-4,
            atol=1e-5,
        )
    assert len(traces) == 2


@pytest.mark.parametrize("lifted", [Block, Rematted, Jitted], ids=["plain", "remat", "jit"])
def test_recalibrate_within_lifted_layers(lifted):
    """What is seen in there comes out of there."""
    model = blocks(lifted, functools.partial(lifted, 5))
    model, variables = with_variables(model, X)
    plain = blocks(Block, functools.partial(Block, 5))
    names = dict(zip(sorted(variables["params"]), ("Block_0", "Block_1"), strict=True))
    renamed = {c: {names[k]: v for k, v in tree.items()} for c, tree in variables.items()}
    want = recalibrate(plain, renamed, [X, OTHER])["batch_stats"]
    got = recalibrate(model, variables, [X, OTHER])["batch_stats"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, {names[k]: v for k, v in got.items()}, want)
