import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from models import (
    BasicBlock,
    BottleneckBlock,
    Layer,
    NnxResNet,
    ResNet,
    chain,
    norm,
    output,
    with_variables,
)

import bn_jax.linen
import bn_jax.nnx
from bn_jax.models import CNN, MLP
from bn_jax.surgery import fold, recalibrate
from bn_jax.surgery.tree import get_stats

RNG = np.random.default_rng(0)
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


LINE, IMAGE, SOLID = (3, 7, 4), (2, 6, 5, 4), (2, 3, 3, 4, 2)
CONV = functools.partial(Layer, "Conv")
GENERAL = functools.partial(Layer, "DenseGeneral")
NO_BIAS = {"use_bias": False}
# The shape of the input, the layer, the axis of the BatchNorm.
BEFORE = {
    "dense": (LINE, Layer("Dense", (5,)), -1),
    "dense without bias": (LINE, Layer("Dense", (5,), NO_BIAS), -1),
    "general, all features": (LINE, GENERAL(((3, 5),)), (-2, -1)),
    "general, all, named in another order": (LINE, GENERAL(((3, 5),)), (3, 2)),
    "general, the last": (LINE, GENERAL(((3, 5),)), -1),
    "general, the first": (LINE, GENERAL(((3, 5),), NO_BIAS), -2),
    "general, over two axes": (LINE, GENERAL((5,), {"axis": (-2, -1)}), -1),
    "general, over the first axis": (LINE, GENERAL((5,), {"axis": 1}), -1),
    "1-D": (LINE, CONV((5, (3,))), -1),
    "2-D": (IMAGE, CONV((6, (3, 2))), -1),
    "3-D": (SOLID, CONV((3, (2, 3, 1)), NO_BIAS), -1),
    "grouped": (IMAGE, CONV((6, (3, 3)), {"feature_group_count": 2}), -1),
    "depthwise": (IMAGE, CONV((8, (3, 3)), {"feature_group_count": 4} | NO_BIAS), -1),
    "dilated": (IMAGE, CONV((6, (3, 3)), {"kernel_dilation": 2}), -1),
    "strided": (IMAGE, CONV((6, (3, 3)), {"strides": 2, "padding": "VALID"}), -1),
    "input dilation": (LINE, CONV((5, (3,)), {"input_dilation": 2, "padding": 1}), -1),
    "circular": (IMAGE, CONV((6, (3, 3)), {"padding": "CIRCULAR"}), -1),
    "masked": (LINE, CONV((4, (1,)), {"mask": np.float32(np.triu(np.ones((1, 4, 4))))}), -1),
    "transposed": (IMAGE, Layer("ConvTranspose", (6, (3, 3), (2, 2))), -1),
    "transposed, kernel too": (
        IMAGE, Layer("ConvTranspose", (6, (3, 2)), {"transpose_kernel": True}), -1,
    ),
    "transposed, no bias": (
        LINE, Layer("ConvTranspose", (5, (3,)), {"transpose_kernel": True} | NO_BIAS), -1,
    ),
}  # fmt: skip


@both_homes
@pytest.mark.parametrize(("shape", "layer", "axis"), BEFORE.values(), ids=BEFORE)
def test_into_the_layer_before(home, shape, layer, axis):
    x = sample(*shape)
    model, variables, paths = chain(home, x, layer, norm(axis=axis))
    folded = check(model, variables, x)
    assert folded.pairs == [(paths[1], paths[0], "before")]
    assert folded.refused == {}
    assert_gone(folded, x)


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


@both_homes
@pytest.mark.parametrize(("shape", "axis", "layer"), AFTER.values(), ids=AFTER)
def test_into_the_layer_after(home, shape, axis, layer):
    x = sample(*shape)
    model, variables, paths = chain(home, x, norm(axis=axis), layer)
    folded = check(model, variables, x)
    assert folded.pairs == [(paths[0], paths[1], "after")]
    assert_gone(folded, x)


ZERO_PADDED = {
    "same": CONV((5, (3, 3))),
    "number": CONV((5, (3, 3)), {"padding": 1}),
    "one side": CONV((5, (3, 3)), {"padding": ((0, 0), (0, 1))}),
    "a number and a pair": CONV((5, (3, 3)), {"padding": (0, (0, 1))}),
    "1x1": CONV((5, (1, 1)), {"padding": 1}),
}


@both_homes
@pytest.mark.parametrize("layer", ZERO_PADDED.values(), ids=ZERO_PADDED)
def test_padding_with_zeros_is_refused(home, layer):
    x = sample(*TINY)
    model, variables, paths = chain(home, x, norm(), layer)
    folded = check(model, variables, x)
    assert folded.pairs == []
    assert "pads with zeros" in folded.refused[paths[0]]


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
@pytest.mark.parametrize(
    "fields",
    [
        {"use_scale": False},
        {"use_bias": False},
        {"use_scale": False, "use_bias": False},
        {"epsilon": 0.5},
        {"momentum": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("norms", ["ours", "flax"])
def test_settings_of_the_norm(home, norms, fields):
    x = sample(*LINE)
    layers = Layer("Dense", (5,)), norm(**fields), Layer(nn.relu), norm(**fields)
    model, variables, _ = chain(home, x, *layers, Layer("Dense", (2,)), norms=norms)
    folded = check(model, variables, x)
    assert [pair.side for pair in folded.pairs] == ["before", "after"]
    assert_gone(folded, x)


@both_homes
def test_an_activation_of_ours_stays(home):
    x = sample(*LINE)
    layers = Layer("Dense", (5,)), norm(activation=nn.silu), Layer("Dense", (3,))
    model, variables, _ = chain(home, x, *layers)
    folded = check(model, variables, x)
    assert [pair.side for pair in folded.pairs] == ["before"]
    assert_gone(folded, x)


@both_homes
def test_an_activation_of_ours_keeps_the_layer_after_from_absorbing(home):
    x = sample(*LINE)
    model, variables, paths = chain(home, x, norm(activation=nn.relu), Layer("Dense", (3,)))
    folded = check(model, variables, x)
    assert folded.pairs == []
    assert "activation" in folded.refused[paths[0]]


@both_homes
@pytest.mark.parametrize("kind", ["GhostBatchNorm", "BatchRenorm"])
def test_variants_of_the_norm(home, kind):
    def build():
        dense = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
        variant = getattr(bn_jax.nnx, kind)
        return nnx.Sequential(dense, variant(5, use_running_average=True, rngs=nnx.Rngs(0)))

    x = sample(*LINE)
    variant = getattr(bn_jax.linen, kind)
    linen = nn.Sequential([nn.Dense(5), variant(use_running_average=True)])
    folded = check(*with_variables(build if home == "nnx" else linen, x), x)
    assert len(folded.pairs) == 1
    assert_gone(folded, x)


@both_homes
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_bfloat16_parameters(home, order, use_bias):
    """The output keeps its dtype, though statistics and the folded bias are float32."""
    x = sample(*LINE, dtype=jnp.bfloat16)
    half = {"param_dtype": jnp.bfloat16}
    layers = [Layer("Dense", (4,), half | {"use_bias": use_bias}), norm(**half)]
    layers = layers if order == "before" else layers[::-1]
    model, variables, _ = chain(home, x, *layers)
    assert output(model, variables, x).dtype == jnp.bfloat16
    folded = check(model, variables, x, tolerance=0.05)
    assert [pair.side for pair in folded.pairs] == [order]


@both_homes
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("norms", ["ours", "flax"])
def test_computation_in_another_dtype(home, norms, dtype):
    """`dtype` of the BatchNorm decides that of the output, and float32 kernels stay so."""
    x = sample(*LINE, dtype=jnp.bfloat16)
    dense = Layer("Dense", (5,), {"dtype": jnp.bfloat16})
    model, variables, _ = chain(home, x, dense, norm(dtype=dtype), norms=norms)
    folded = check(model, variables, x, tolerance=0.05)
    assert {v.dtype for v in jax.tree.leaves(folded.variables)} == {jnp.dtype("float32")}


def test_parameters_keep_their_dtype():
    x = sample(*LINE)
    model, variables, _ = chain(
        "linen", x, Layer("Dense", (5,), {"param_dtype": jnp.bfloat16}), norm()
    )
    folded = fold(model, variables, x, tolerance=0.05)
    dtypes = {v.dtype for v in jax.tree.leaves(folded.variables)}
    assert dtypes == {jnp.dtype("bfloat16")}


@both_homes
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norms", ["ours", "flax"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_float64(home, norms, order):
    x = sample(*LINE, dtype=jnp.float64)
    wide = {"param_dtype": jnp.float64}
    layers = [Layer("Dense", (4,), wide), norm(**wide)]
    layers = layers if order == "before" else layers[::-1]
    model, variables, _ = chain(home, x, *layers, norms=norms)
    assert output(model, variables, x).dtype == jnp.float64
    folded = check(model, variables, x, tolerance=1e-12)
    assert len(folded.pairs) == 1


def test_complex():
    x = sample(*LINE) + 1j * sample(*LINE)
    layers = Layer("Dense", (5,), {"param_dtype": jnp.complex64}), norm()
    model, variables, _ = chain("linen", x, *layers)
    mean = variables["batch_stats"]["layers_1"]["mean"]
    variables["batch_stats"]["layers_1"]["mean"] = mean + 0.3 - 0.2j
    assert len(check(model, variables, x).pairs) == 1


def float64(variables, layer):
    return {k: np.float64(v) for k, v in variables["params"][layer].items()}


def affine(variables):
    stats = {k: np.float64(v) for k, v in variables["batch_stats"]["layers_1"].items()}
    p = float64(variables, "layers_1")
    return lambda h: (h - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * p["scale"] + p["bias"]


def test_a_dense_layer_against_float64():
    x = sample(*LINE)
    model, variables, _ = chain("linen", x, Layer("Dense", (5,)), norm())
    dense = float64(variables, "layers_0")
    want = affine(variables)(np.float64(x) @ dense["kernel"] + dense["bias"])
    folded = fold(model, variables, x)
    assert_close(np.float64(output(folded.model, folded.variables, x)), want)
    p = float64(folded.variables, "layers_0")
    np.testing.assert_allclose(
        np.float64(x) @ p["kernel"] + p["bias"], want, rtol=1e-5, atol=1e-5
    )


def test_agrouped_convolution_against_float64():
    """A sum over the window of each position, group by group."""
    x = sample(2, 7, 4)
    conv = CONV((6, (3,)), {"feature_group_count": 2, "strides": 2, "padding": "VALID"})
    model, variables, _ = chain("linen", x, conv, norm())
    p = float64(variables, "layers_0")
    windows = np.stack([np.float64(x)[:, i : i + 3] for i in (0, 2, 4)], 1)
    groups = [
        np.einsum(
            "nwki,kio->nwo",
            windows[..., 2 * g : 2 * g + 2],
            p["kernel"][..., 3 * g : 3 * g + 3],
        )
        for g in (0, 1)
    ]
    want = affine(variables)(np.concatenate(groups, -1) + p["bias"])
    folded = fold(model, variables, x)
    assert_close(np.float64(output(folded.model, folded.variables, x)), want)


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
def test_nothing_of_the_callers_is_changed(home):
    x = sample(*LINE)
    model, variables, _ = chain(home, x, norm(), Layer("Dense", (5,)), norm())
    before, want = jax.tree.map(np.array, variables), output(model, variables, x)
    structure = jax.tree.structure(variables)
    fold(model, variables, x)
    assert jax.tree.structure(variables) == structure
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    np.testing.assert_array_equal(output(model, variables, x), want)


@both_homes
def test_what_the_folded_model_can_do(home):
    """Under jit, vmap and grad it is the function that the model was."""
    x = sample(*LINE)
    layers = Layer("Dense", (5,)), norm(), Layer(nn.tanh), Layer("Dense", (3,)), norm()
    model, variables, _ = chain(home, x, *layers)
    folded = fold(model, variables, x)
    old = functools.partial(output, model, variables)
    new = functools.partial(output, folded.model, folded.variables)
    assert_close(jax.jit(new)(x), old(x))
    assert_close(jax.vmap(new)(x), old(x))
    assert_close(*(jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2))(x) for f in (new, old)))


@both_homes
def test_the_folded_model_trains(home):
    x = sample(*LINE)
    model, variables, _ = chain(home, x, Layer("Dense", (5,), {"use_bias": False}), norm())
    folded = fold(model, variables, x)
    gradients = jax.grad(lambda v: jnp.sum(output(folded.model, v, x) ** 2))(folded.variables)
    y, flat = output(model, variables, x), x.reshape(-1, 4)
    leaves = {v.shape: v for v in jax.tree.leaves(gradients)}
    assert_close(leaves[4, 5], 2 * flat.T @ y.reshape(-1, 5))
    assert_close(leaves[5,], jnp.sum(2 * y, axis=(0, 1)))
    updates, _ = optax.sgd(0.1).update(gradients, optax.sgd(0.1).init(folded.variables))
    optax.apply_updates(folded.variables, updates)


@both_homes
def test_the_folded_variables_can_be_saved(home, tmp_path):
    x = sample(*LINE)
    model, variables, _ = chain(home, x, Layer("Dense", (5,)), norm())
    folded = fold(model, variables, x)
    tree = folded.variables
    tree = nnx.to_pure_dict(tree) if home == "nnx" else tree
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "folded", tree)
        checkpointer.wait_until_finished()
        read = checkpointer.restore(tmp_path / "folded", jax.tree.map(jnp.zeros_like, tree))
    jax.tree.map(np.testing.assert_array_equal, read, tree)


@both_homes
def test_folded_again_there_is_nothing_left(home):
    x = sample(*LINE)
    model, variables, _ = chain(home, x, Layer("Dense", (5,)), norm())
    once = fold(model, variables, x)
    twice = fold(once.model, once.variables, x)
    assert (twice.pairs, twice.refused, twice.difference) == ([], {}, 0)
    assert jax.tree.structure(twice.variables) == jax.tree.structure(once.variables)


@both_homes
def test_one_norm_after_another_is_folded_in_two_turns(home):
    x = sample(*LINE)
    model, variables, paths = chain(home, x, Layer("Dense", (5,)), norm(), norm())
    once = check(model, variables, x)
    assert once.pairs == [(paths[1], paths[0], "before")]
    assert once.refused.keys() == {paths[2]}
    twice = check(once.model, once.variables, x)
    assert twice.pairs == [(paths[2], paths[0], "before")]
    assert_close(output(twice.model, twice.variables, x), output(model, variables, x))
    assert_gone(twice, x)


OUTPUTS = {
    "integers": lambda y: (y, jnp.argmax(y, -1)),
    "bools": lambda y: (y, y > 0),
    "a constant": lambda y: (y, 0.0),
    "an empty array": lambda y: (y, y[:0]),
    "none": lambda y: {"logits": y, "loss": None},
    "minus infinity": lambda y: jnp.where(y > 0, y, -jnp.inf),
}


@both_homes
@pytest.mark.parametrize("tail", OUTPUTS.values(), ids=OUTPUTS)
def test_what_a_model_may_return(home, tail):
    x = sample(*LINE)
    model, variables, _ = chain(home, x, Layer("Dense", (5,)), norm(), Layer(tail))
    folded = fold(model, variables, x)
    assert len(folded.pairs) == 1
    assert folded.difference <= 1e-5


def test_several_inputs_some_by_name():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, *, y, train):
            def block(v):
                v = nn.Dense(features=3)(inputs=v)
                return nn.BatchNorm(use_running_average=not train)(x=v)

            return block(x) + nn.relu(block(y))

    x, y = sample(*LINE), sample(*LINE)
    model, variables = with_variables(Two(), x, y=y, train=False)
    folded = fold(model, variables, x, y=y, train=False)
    assert len(folded.pairs) == 2
    assert folded.difference <= 1e-5


def test_a_norm_whose_input_is_not_the_first_of_its_names():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(5)(x)
            norm = bn_jax.linen.BatchNorm()
            return norm(use_running_average=True, x=h)

    x = sample(*LINE)
    model, variables = with_variables(Net(), x)
    assert len(check(model, variables, x).pairs) == 1


PLACES = [("before",), ("after",), ("input",), ("input", "before"), ("before", "after")]


@pytest.mark.parametrize("places", PLACES, ids="+".join)
def test_mlp(places):
    x = sample(6, 3, 2)
    model = MLP((6, 5), 3, norm=bn_jax.linen.BatchNorm, places=places)
    model, variables = with_variables(model, x, train=False)
    folded = check(model, variables, x, train=False)
    assert_gone(folded, x, train=False)


@pytest.mark.parametrize("places", PLACES, ids="+".join)
def test_cnn(places):
    """A max-pool follows the norm of a convolution, and SAME convolutions the input's."""
    x = sample(2, 4, 4, 3)
    model = CNN((4, 4, 5), 3, norm=bn_jax.linen.BatchNorm, places=places)
    model, variables = with_variables(model, x, train=False)
    folded = check(model, variables, x, train=False)
    pooled = 2 * ("after" in places)
    assert len(folded.refused) == ("input" in places) + pooled
    assert (
        len(folded.pairs)
        == 3 * (set(places) != {"input"}) * len(set(places) - {"input"}) - pooled
    )


RESNETS = {
    "basic": ((1, 1), BasicBlock, bn_jax.linen.BatchNorm),
    "bottleneck": ((1,), BottleneckBlock, nn.BatchNorm),
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("sizes", "block", "norms"), RESNETS.values(), ids=RESNETS)
def test_resnet(sizes, block, norms, fresh):
    """Fresh from `init` too, with the scales of 0 at the ends of the branches."""
    x = sample(2, 8, 8, 3)
    model, variables = with_variables(ResNet(sizes, block, norm=norms), x, train=False)
    variables = jax.jit(model.init)(jax.random.key(0), x) if fresh else variables
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


@both_homes
def test_recalibrate_after_fold(home):
    """What is folded has no statistics any more; what is left is recalibrated."""
    x = sample(6, 4)
    layers = Layer("Dense", (5,)), norm(), Layer(nn.relu), norm()
    model, variables, paths = chain(home, x, *layers)
    folded = fold(model, variables, x)
    want = get_stats(recalibrate(model, variables, [x]), paths[3])
    got = get_stats(recalibrate(folded.model, folded.variables, [x]), paths[3])
    assert_close(got, want)
