"""BatchNorms that are folded: into which layers, however the model is written, and exactly."""

import dataclasses
import enum
import functools
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign_norms import FLAX, OWN, TORCH, CopyOfFlax, OwnNorm, TorchLike
from models import (
    BasicBlock,
    BottleneckBlock,
    Layer,
    NnxResNet,
    ResNet,
    chain,
    compact,
    in_nnx,
    norm,
    output,
    two_layers,
    with_variables,
)

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import fold
from bn_jax.surgery.flow import trace

RNG = np.random.default_rng(0)
BatchNorm = functools.partial(bn_jax.linen.BatchNorm, use_running_average=True)
both_homes = pytest.mark.parametrize("home", ["linen", "nnx"])


def sample(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def assert_close(got, want, tolerance=1e-5):
    """Relative to the largest of each array; dtypes are the same."""

    def compare(a, b):
        assert a.dtype == b.dtype
        a, b = (
            np.asarray(v, np.complex128 if jnp.iscomplexobj(v) else np.float64) for v in (a, b)
        )
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))

    jax.tree.map(compare, got, want)


def assert_gone(folded, *inputs, **call):
    """No BatchNorm is left, in the program or among the variables."""
    program = jax.make_jaxpr(functools.partial(output, folded.model, **call))
    assert "rsqrt" not in str(program(folded.variables, *inputs))
    if isinstance(folded.variables, nnx.State):
        assert not jax.tree.leaves(nnx.filter_state(folded.variables, nnx.BatchStat))
    else:
        assert "batch_stats" not in folded.variables
    leaves = jax.tree_util.tree_leaves_with_path(folded.variables)
    names = {getattr(key, "key", None) for path, _ in leaves for key in path}
    assert not names & {"scale", "mean", "var", "count"}


def check(model, variables, x, tolerance=1e-5, **call):
    """Folds by one sample and compares by another, of which no value is the same."""
    folded = fold(model, variables, x, tolerance=max(1e-4, tolerance), **call)
    other = 1 - 2 * x[::-1]
    got = output(folded.model, folded.variables, other, **call)
    assert_close(got, output(model, variables, other, **call), tolerance)
    assert folded.difference <= tolerance
    return folded


X = sample(3, 4)
LINE, SOLID = (3, 7, 4), (2, 3, 3, 4, 2)
CONV = functools.partial(Layer, "Conv")
GENERAL = functools.partial(Layer, "DenseGeneral")
NO_BIAS = {"use_bias": False}
# The shape of the input, the layer, the axis of the BatchNorm. Dense, and convolutions of
# images, are drawn in `test_generated`.
BEFORE = {
    "general, all features": (LINE, GENERAL(((3, 5),)), (-2, -1)),
    "general, all, named in another order": (LINE, GENERAL(((3, 5),)), (3, 2)),
    "general, the last": (LINE, GENERAL(((3, 5),)), -1),
    "general, the first": (LINE, GENERAL(((3, 5),), NO_BIAS), -2),
    "general, over two axes": (LINE, GENERAL((5,), {"axis": (-2, -1)}), -1),
    "general, over the first axis": (LINE, GENERAL((5,), {"axis": 1}), -1),
    "1-D": (LINE, CONV((5, (3,))), -1),
    "3-D": (SOLID, CONV((3, (2, 3, 1)), NO_BIAS), -1),
    "input dilation": (LINE, CONV((5, (3,)), {"input_dilation": 2, "padding": 1}), -1),
    "masked": (LINE, CONV((4, (1,)), {"mask": np.float32(np.triu(np.ones((1, 4, 4))))}), -1),
}  # fmt: skip


TINY = (2, 5, 5, 4)
VALID = {"padding": "VALID"}
# The shape of the input, the axis of the BatchNorm, the layer.
AFTER = {
    "dense": (LINE, -1, Layer("Dense", (5,), NO_BIAS)),
    "general over two": (LINE, (1, 2), GENERAL((5,), {"axis": (-2, -1)})),
    "general over two, one normalised": (LINE, 1, GENERAL((5,), {"axis": (1, 2)})),
    # Flax sorts the axes.
    "general over two, in turn": ((3, 4, 4), 1, GENERAL(((3, 5),), {"axis": (-1, -2)})),
    "general over the first": (LINE, 1, GENERAL(((3, 5),), {"axis": 1})),
    "valid": (TINY, -1, CONV((6, (3, 2)), VALID)),
    "valid, strided": (TINY, -1, CONV((6, (2, 2)), VALID | {"strides": 2})),
    "valid, dilated": (TINY, -1, CONV((6, (2, 2)), VALID | {"kernel_dilation": 2})),
    "1x1 same": (TINY, -1, CONV((6, (1, 1)), {"strides": 2} | NO_BIAS)),
    "circular": (TINY, -1, CONV((6, (3, 3)), {"padding": "CIRCULAR"})),
    "reflect": (TINY, -1, CONV((6, (3, 3)), {"padding": "REFLECT"})),
    "padding 0": (TINY, -1, CONV((6, (3, 3)), {"padding": 0})),
    "padding of pairs": (TINY, -1, CONV((6, (3, 3)), {"padding": ((0, 0), (0, 0))})),
    "padding of both": (TINY, -1, CONV((6, (3, 3)), {"padding": (0, (0, 0))})),
    "grouped": (TINY, -1, CONV((6, (2, 2)), VALID | {"feature_group_count": 2})),
    "depthwise": (TINY, -1, CONV((8, (2, 2)), VALID | {"feature_group_count": 4})),
}


CASES = [(s, [layer, norm(axis=axis)], "before") for s, layer, axis in BEFORE.values()]
CASES += [(s, [norm(axis=axis), layer], "after") for s, axis, layer in AFTER.values()]


@both_homes
@pytest.mark.parametrize(("shape", "layers", "side"), CASES, ids=[*BEFORE, *AFTER])
def test_into_one_layer(home, shape, layers, side):
    x = sample(*shape)
    model, variables, paths = chain(home, x, *layers)
    folded = check(model, variables, x)
    one, other = paths if side == "after" else paths[::-1]
    assert folded.pairs == [(one, other, side)]
    assert folded.refused == {}
    assert_gone(folded, x)


@both_homes
@pytest.mark.parametrize(
    "layer",
    [Layer("Dense", (5,)), CONV((6, (2, 2)), {"padding": "VALID", "feature_group_count": 2})],
    ids=["dense", "conv"],
)
def test_on_both_sides_at_once(home, layer):
    x = sample(*TINY)
    model, variables, paths = chain(home, x, norm(), layer, norm(), norms="flax")
    folded = check(model, variables, x)
    assert set(folded.pairs) == {(paths[0], paths[1], "after"), (paths[2], paths[1], "before")}
    assert_gone(folded, x)


@both_homes
@pytest.mark.parametrize("kind", ["BatchNorm", "GhostBatchNorm", "BatchRenorm"])
def test_variants_of_the_norm_and_its_activation(home, kind):
    fields = {"use_running_average": True, "activation": nn.silu}

    def build():
        variant = getattr(bn_jax.nnx, kind)(5, **fields, rngs=nnx.Rngs(0))
        return nnx.Sequential(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), variant)

    x = sample(*LINE)
    linen = nn.Sequential([nn.Dense(5), getattr(bn_jax.linen, kind)(**fields)])
    folded = check(*with_variables(build if home == "nnx" else linen, x), x)
    assert [pair.side for pair in folded.pairs] == ["before"]
    assert_gone(folded, x)


HALF, SINGLE, WIDE, COMPLEX = jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64
# The dtype of the input, the fields of the layer and of the norm, how exact the result is.
DTYPES = {
    "bfloat16": (HALF, {"param_dtype": HALF}, {"param_dtype": HALF}, 0.05),
    "bfloat16 without bias": (HALF, {"param_dtype": HALF, "use_bias": False}, {}, 0.05),
    "mixed": (HALF, {"dtype": HALF}, {"dtype": HALF}, 0.05),
    "mixed, float32 norm": (HALF, {"dtype": HALF}, {"dtype": SINGLE}, 0.05),
    "float64": (WIDE, {"param_dtype": WIDE}, {"param_dtype": WIDE}, 1e-12),
    "complex": (COMPLEX, {"param_dtype": COMPLEX}, {}, 1e-5),
}


@pytest.mark.parametrize(
    ("home", "norms", "order"), [("linen", "ours", "after"), ("nnx", "flax", "before")]
)
@pytest.mark.parametrize(("dtype", "dense", "fields", "tolerance"), DTYPES.values(), ids=DTYPES)
def test_dtypes(home, norms, order, dtype, dense, fields, tolerance):
    """Outputs and parameters keep theirs."""
    with jax.enable_x64(dtype == WIDE):
        x = sample(*LINE, dtype=dtype)
        layers = [Layer("Dense", (4,), dense), norm(**fields)]
        layers = layers if order == "before" else layers[::-1]
        model, variables, _ = chain(home, x, *layers, norms=norms)
        folded = check(model, variables, x, tolerance=tolerance)
        assert [pair.side for pair in folded.pairs] == [order]
        kernel = jnp.dtype(dense.get("param_dtype", SINGLE))
        assert kernel in {v.dtype for v in jax.tree.leaves(folded.variables)}


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_metadata_of_parameters_stays(box):
    x = sample(*LINE)
    init = box(nn.initializers.lecun_normal(), (None, "features"))
    layers = Layer("Dense", (5,), {"kernel_init": init}), norm()
    model, variables, _ = chain("linen", x, *layers)
    folded = check(model, variables, x)
    old, new = (v["params"]["layers_0"]["kernel"] for v in (variables, folded.variables))
    assert (type(new), new.names) == (type(old), old.names)
    assert_gone(folded, x)


def test_metadata_of_nnx_stays():
    x = sample(*LINE)

    def build():
        metadata = {"kernel_metadata": {"note": "mine"}, "rngs": nnx.Rngs(0)}
        norms = bn_jax.nnx.BatchNorm(5, use_running_average=True, rngs=nnx.Rngs(0))
        return nnx.Sequential(nnx.Linear(4, 5, **metadata), norms)

    folded = check(*with_variables(build), x)
    assert folded.variables["layers"][0]["kernel"].note == "mine"


def test_other_collections_stay():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("counters", "calls", lambda: jnp.int32(3))
            calls.value += 1
            group = nn.BatchNorm(use_running_average=True)(nn.Dense(5)(x))
            return nn.relu(nn.BatchNorm(use_running_average=True)(nn.relu(group)))

    x = sample(*LINE)
    model, variables = with_variables(Counting(), x)
    folded = fold(model, variables, x)
    assert len(folded.pairs) == 1
    assert folded.variables["counters"] == variables["counters"]
    assert set(folded.variables["batch_stats"]) == {"BatchNorm_1"}
    assert set(folded.variables["params"]) == {"Dense_0", "BatchNorm_1"}
    want = model.apply(variables, x, mutable="counters")
    got = folded.model.apply(folded.variables, x, mutable="counters")
    assert_close(got, want)


@both_homes
def test_one_norm_after_another_is_folded_in_two_turns(home):
    x = sample(*LINE)
    model, variables, paths = chain(home, x, Layer("Dense", (5,)), norm(), norm())
    want = output(model, variables, x)
    for other in paths[1:]:
        folded = check(model, variables, x)
        assert folded.pairs == [(other, paths[0], "before")]
        model, variables = folded.model, folded.variables
    assert_close(output(model, variables, x), want)
    assert_gone(folded, x)
    again = fold(model, variables, x)
    assert (again.pairs, again.refused, again.difference) == ([], {}, 0)


@both_homes
def test_a_folded_model_is_a_model(home):
    """It does what the model does, which stays as it is; it pickles, and is traced once."""
    x = sample(*LINE)
    model, variables, _ = chain("nnx", x, Layer("Dense", (5,)), norm())
    if home == "linen":
        model, variables = with_variables(Block(), x)
    before = jax.tree.map(np.array, variables)
    old = functools.partial(output, model, variables)
    want, derivative = old(x), jax.grad(lambda x: jnp.sum(old(x) ** 2))(x)
    folded = fold(model, variables, x)
    new = functools.partial(output, folded.model, folded.variables)
    assert_close([new(x), jax.vmap(new)(x)], [want] * 2)
    assert_close(jax.grad(lambda x: jnp.sum(new(x) ** 2))(x), derivative)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    np.testing.assert_array_equal(old(x), want)
    again = pickle.loads(pickle.dumps(folded.model))
    np.testing.assert_array_equal(output(again, folded.variables, x), new(x))
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def predict(model, variables, x):
        traces.append(model)
        return output(model, variables, x)

    for _ in range(2):
        assert_close(predict(folded.model, folded.variables, x), want)
    assert len(traces) == 1
    if home == "linen":
        np.testing.assert_array_equal(folded.model.bind(folded.variables)(x), new(x))
        assert "Dense_0" in folded.model.tabulate(jax.random.key(0), x)


def test_several_inputs_some_by_name():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, *, y, train):
            def block(v):
                v = nn.Dense(features=3)(inputs=v)
                return nn.BatchNorm(use_running_average=not train)(x=v)

            z = bn_jax.linen.BatchNorm()(use_running_average=not train, x=nn.Dense(3)(x))
            return block(x) + nn.relu(block(y)) + nn.relu(z)

    x, y = sample(*LINE), sample(*LINE)
    model, variables = with_variables(Two(), x, y=y, train=False)
    folded = fold(model, variables, x, y=y, train=False)
    assert len(folded.pairs) == 3
    assert folded.difference <= 1e-5


class Mode(enum.Enum):
    TRAIN = 1


@dataclasses.dataclass
class Output:
    logits: Any
    more: Any


def all_kinds(y):
    """What else than arrays of numbers a model returns."""
    key = jax.random.key(jnp.int32(jnp.round(jnp.abs(y[0, 0]) * 9)))
    others = Output(y, [None, 3, True, np.float32(2), "encoder", Mode.TRAIN, jax.random.key(3)])
    empty = y[:0], jnp.zeros((0, 3), bool)
    return y, key, others, jnp.argmax(y, -1), y > 0, empty, jnp.where(y > 0, y, -jnp.inf), 0.0


OUTPUTS = {
    "all kinds": all_kinds, "integers": lambda y: jnp.argmax(y, -1), "nothing": lambda y: None,
    "a number": lambda y: y.sum(),
}  # fmt: skip


@pytest.mark.parametrize("tail", OUTPUTS.values(), ids=OUTPUTS)
def test_what_a_model_may_return(tail):
    model = compact(lambda x: tail(nn.relu(BatchNorm()(nn.Dense(4)(x)))))
    folded = fold(*with_variables(model, X), X)
    assert len(folded.pairs) == 1
    assert folded.difference <= 1e-5


RESNETS = [((1, 1), BasicBlock, bn_jax.linen.BatchNorm), ((1,), BottleneckBlock, nn.BatchNorm)]


@pytest.mark.parametrize(("sizes", "block", "norms"), RESNETS, ids=["basic", "bottleneck"])
def test_resnet(sizes, block, norms):
    """The first from `init`, with scales of 0 at the ends of the branches."""
    x = sample(2, 8, 8, 3)
    model, variables = with_variables(ResNet(sizes, block, norm=norms), x, train=False)
    if block is BasicBlock:
        variables = jax.jit(model.init)(jax.random.key(0), x)
    folded = check(model, variables, x, train=False)
    assert folded.refused == {}
    assert len(folded.pairs) == len(jax.tree.leaves(variables["batch_stats"])) // 2
    assert_gone(folded, x, train=False)


def test_nnx_resnet():
    x = sample(2, 8, 8, 3)

    def build():
        module = NnxResNet((1, 1), nnx.BatchNorm, nnx.Rngs(0))
        module.eval()
        return module

    folded = check(*with_variables(build), x)
    assert folded.refused == {}
    assert len(folded.pairs) == 6
    assert_gone(folded, x)


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


LINEN = {
    "compact": blocks(Block, functools.partial(Block, 5)),
    "setup": InSetup(),
    "attributes": Holder(nn.Dense(4), (BatchNorm(), nn.Dense(5), BatchNorm())),
    "sequential": nn.Sequential([nn.Sequential([nn.Dense(4), BatchNorm(), nn.relu]), Block()]),
    "named": InSetup(name="model"),
    "remat": blocks(Rematted, Rematted),
    "jit": blocks(Jitted, functools.partial(Jitted, 5)),
    "jit twice alike": blocks(Jitted, Jitted),
    "share_scope": compact(sharing),
    "jax.jit": compact(nested),
}


def in_containers():
    layers = two_layers()
    lists = nnx.List([layers["n"], layers["a"]]), nnx.Dict(p=layers["b"])
    return {"z": lists[0], "y": nnx.Dict(r=lists[1]), "first": layers["m"]}


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
NNX = {
    "attributes": (two_layers, lambda s, x: pair(s.b, s.m, pair(s.a, s.n, x))),
    "lists": (in_containers, lambda s, x: pair(s.y.r["p"], s.first, pair(s.z[1], s.z[0], x))),
    "shared": (shared, lambda s, x: pair(s.y.s.p, s.m, pair(s.x[0], s.y.r[1], x))),
    "sequential": (sequences, lambda s, x: s.all(x)),
    "nnx.jit": (two_layers, lambda s, x: JITTED(s.b, s.m, JITTED(s.a, s.n, x))),
    "nnx.remat": (two_layers, lambda s, x: REMATTED(s.b, s.m, REMATTED(s.a, s.n, x))),
}
WRITTEN = LINEN | {f"nnx, {name}": in_nnx(*v) for name, v in NNX.items()}


@pytest.mark.parametrize("model", WRITTEN.values(), ids=WRITTEN)
def test_ways_to_write_a_model(model):
    """Twice: what the first time left in the caches of jit does not matter."""
    model, variables = with_variables(model, X)
    output(model, variables, X)
    for _ in range(2):
        folded = check(model, variables, X)
        assert [pair.side for pair in folded.pairs] == ["before"] * 2
        assert_gone(folded, X)


def test_a_vmap_over_examples_is_no_obstacle():
    model, variables = with_variables(
        in_nnx(two_layers, lambda s, x: jax.vmap(s.n)(jax.vmap(s.a)(x)))
    )
    x = sample(3, 2, 4)
    folded = fold(model, variables, x)
    assert folded.pairs == [(("n",), ("a",), "before")]
    assert_close(output(folded.model, folded.variables, 1 - x), output(model, variables, 1 - x))


def test_identities_in_between():
    def function(x):
        y = jax.ad_checkpoint.checkpoint_name(jnp.array(nn.Dense(4)(x)), "kept")
        y = jax.lax.optimization_barrier(jax.lax.stop_gradient(y.astype(y.dtype)))
        return nn.relu(BatchNorm()(y))

    assert len(check(*with_variables(compact(function), X), X).pairs) == 1


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


CLASSES = {
    "own": (OwnNorm, OWN, lambda norm, h: norm(h, False)),
    "torch's": (TorchLike, TORCH, lambda norm, h: norm(h, train=False)),
    "copy of Flax's": (CopyOfFlax, FLAX, lambda norm, h: norm(h, True)),
}


@pytest.mark.parametrize(("cls", "adapters", "call"), CLASSES.values(), ids=CLASSES)
def test_a_batch_norm_of_ones_own_is_folded_or_named(cls, adapters, call):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(call(cls(name="own"), nn.Dense(4)(x)))
            return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)))

    model, variables = with_variables(Net(), X)
    positive = jax.tree.map(lambda v: jnp.abs(v) + 0.2, variables["batch_stats"])
    variables = {**variables, "batch_stats": positive}
    folded = fold(model, variables, X)
    assert [p.norm for p in folded.pairs] == [("BatchNorm_0",)]
    assert f"its class is not known: {cls.__module__}.{cls.__name__}" in folded.refused["own",]
    folded = fold(model, variables, X, batch_norms=adapters)
    assert len(folded.pairs) == 2
    assert "batch_stats" not in folded.variables
    want = model.apply(variables, 1 - X)
    got = folded.model.apply(folded.variables, 1 - X)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
