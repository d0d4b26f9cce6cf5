"""Norms in place of BatchNorms, against networks that are written with them."""

import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign_norms import NORMS as OWN_NORMS
from foreign_norms import X as OWN_X
from models import BasicBlock, ResNet, drawn, with_variables

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import accumulate, accumulate_exactly, fold, freeze, recalibrate, swap
from bn_jax.surgery.tree import by_layer

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(1, 2, (8, 3, 2, 4)), jnp.float32)
VECTORS = IMAGES[:, 0, 0]
both_homes = pytest.mark.parametrize("home", ["linen", "nnx"])
STATS = {"epsilon": 1e-2, "momentum": 0.9}


class LinenNet(nn.Module):
    norm: type = functools.partial(nn.BatchNorm, **STATS)

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(8, name="a")(x)
        x = self.norm(name="bn")(x, use_running_average=not train)
        return nn.Dense(3, name="b")(nn.tanh(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs, **STATS)
        self.b = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.bn(self.a(x))))


class Written(nn.Module):
    """A norm of Flax, or a formula, with the call and the bias of a BatchNorm."""

    norm: type = None
    formula: object = None
    biased: bool = False

    @nn.compact
    def __call__(self, x, use_running_average):
        if self.norm is not None:
            layer = self.norm()
            nn.share_scope(self, layer)
            x = layer(x)
        if self.formula is not None:
            alpha = self.param("alpha", nn.initializers.constant(0.5), ())
            x = self.formula(x, alpha) * self.vector("scale", x)
        return x + self.vector("bias", x) if self.biased else x

    @nn.nowrap
    def vector(self, name, x):
        v = self.param(name, nn.initializers.ones, x.shape[-1:])
        return v.reshape((1,) * (x.ndim - 1) + v.shape)


def written(norm=None, **fields):
    norm = None if norm is None else functools.partial(norm, epsilon=STATS["epsilon"])
    return functools.partial(Written, norm, **fields)


CASES = {
    "none": ({}, written(biased=True)),
    "flax": ({}, functools.partial(nn.BatchNorm, **STATS)),
    "bn": ({}, functools.partial(bn_jax.linen.BatchNorm, **STATS)),
    "layer": ({}, written(nn.LayerNorm)),
    "group": ({}, written(functools.partial(nn.GroupNorm, num_groups=8))),
    "group of 4": ({"num_groups": 4}, written(functools.partial(nn.GroupNorm, num_groups=4))),
    "instance": ({}, written(nn.InstanceNorm)),
    "rms": ({}, written(nn.RMSNorm, biased=True)),
    "dyt": ({}, written(formula=lambda x, alpha: jnp.tanh(alpha * x), biased=True)),
    "ghost": (
        {"group_size": 4},
        functools.partial(bn_jax.linen.GhostBatchNorm, group_size=4, **STATS),
    ),
    "renorm": (
        {"r_max": 1.1, "d_max": 0.1},
        functools.partial(bn_jax.linen.BatchRenorm, r_max=1.1, d_max=0.1, **STATS),
    ),
}
each_norm = pytest.mark.parametrize("norm", CASES)


def both(home, norm, x):
    """What swapped and written networks make of the same variables: functions of them."""
    name, options = norm.split(" ")[0], CASES[norm][0]
    target = LinenNet(CASES[norm][1])
    if home == "linen":
        model = swap(LinenNet(), name, **options)
        variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))

        def run(variables, train):
            return model.apply(variables, x, train=train, mutable=["batch_stats"])
    else:
        module = swap(NnxNet(nnx.Rngs(0)), name, **options)
        graphdef, state = nnx.split(module)
        leaves = by_layer(state)
        variables = {"params": {}, "batch_stats": {}}
        for (layer,), values in leaves.items():
            for n, v in values.items():
                kind = "batch_stats" if n in ("mean", "var", "count") else "params"
                variables[kind].setdefault(layer, {})[n] = v
        variables = drawn(variables)

        def run(variables, train):
            module = nnx.merge(graphdef, state, copy=True)
            for kind in variables.values():
                for layer, values in kind.items():
                    for n, v in values.items():
                        getattr(getattr(module, layer), n).set_value(v)
            module.train() if train else module.eval()
            y = module(x)
            stats = {n: v[...] for n, v in vars(module.bn).items() if type(v) is nnx.BatchStat}
            return y, {"batch_stats": {"bn": stats}}

    def want(variables, train):
        own = jax.eval_shape(target.init, jax.random.key(0), x)
        params = {
            layer: {n: variables["params"][layer][n] for n in leaves}
            for layer, leaves in own["params"].items()
        }
        rest = {"batch_stats": variables["batch_stats"]} if "batch_stats" in own else {}
        given = {"params": params, **rest}
        y, new = target.apply(given, x, train=train, mutable=["batch_stats"])
        return y, new or {"batch_stats": variables["batch_stats"]}

    return run, want, variables


def results(run, variables):
    """In training the outputs, statistics and gradients, and the outputs in evaluation."""

    def loss(params):
        y, new = run({**variables, "params": params}, True)
        return jnp.mean(jnp.sin(y)), (y, new)

    (_, trained), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return trained, grads, run(variables, False)


def assert_close(got, want, tolerance=2e-5):
    """Arrays of the same tree, to rounding of the largest of them."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    largest = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest)
        assert a.dtype == b.dtype


PAIRS = [(norm, home, IMAGES) for norm in CASES for home in ("linen", "nnx")]
# Of a vector a group has to have two channels, and of instances there is nothing left.
PAIRS += [(norm, "linen", VECTORS) for norm in CASES if norm not in ("instance", "group")]


@pytest.mark.parametrize(("norm", "home", "x"), PAIRS, ids=lambda v: str(getattr(v, "ndim", v)))
def test_as_the_network_that_is_written_with_it(norm, home, x):
    run, want, variables = both(home, norm, x)
    pair = jax.jit(lambda v: (results(run, v), results(want, v)))(variables)
    for got, expected in zip(*pair, strict=True):
        assert_close(got, expected)


def test_dyt_in_float64():
    model = swap(LinenNet(), "dyt", alpha=0.7)
    variables = model.init(jax.random.key(0), VECTORS)
    assert variables["params"]["bn"]["alpha"] == np.float32(0.7)
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), drawn(variables)["params"])
    x = np.asarray(VECTORS, np.float64) @ params["a"]["kernel"] + params["a"]["bias"]
    bn = params["bn"]
    y = np.tanh(bn["scale"] * np.tanh(bn["alpha"] * x) + bn["bias"])
    want = y @ params["b"]["kernel"] + params["b"]["bias"]
    np.testing.assert_allclose(model.apply(drawn(variables), VECTORS), want, atol=1e-5)


def one_layer(x, norm, train=True, fields=None, options=None, **call):
    """What a BatchNorm that is swapped returns, with variables at random, and these."""
    fields = {"use_running_average": not train} | STATS | (fields or {})
    ours = {"scale", "activation"} & (call.keys() | fields.keys())
    layer = (bn_jax.linen if ours else nn).BatchNorm(**fields)
    model = swap(layer, norm, **(options or CASES.get(norm, ({},))[0]))
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    y, new = model.apply(variables, x, mutable=["batch_stats"], **call)
    return y, {**variables, **new}, variables


@each_norm
def test_another_feature_axis(norm):
    name, options = norm.split(" ")[0], CASES[norm][0]
    y, *_ = one_layer(jnp.moveaxis(IMAGES, -1, 1), name, fields={"axis": 1}, options=options)
    want, *_ = one_layer(IMAGES, name, options=options)
    np.testing.assert_allclose(jnp.moveaxis(y, 1, -1), want, atol=1e-5)


def test_two_feature_axes():
    y, _, variables = one_layer(IMAGES, "layer", fields={"axis": (-2, -1)})
    layer = nn.LayerNorm(STATS["epsilon"], reduction_axes=(-2, -1), feature_axes=(-2, -1))
    want = layer.apply({"params": variables["params"]}, IMAGES)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_groups_of_vectors_have_two_channels():
    x = jnp.asarray(RNG.normal(size=(4, 24)), jnp.float32)
    y, _, variables = one_layer(x, "group")
    layer = nn.GroupNorm(num_groups=12, epsilon=STATS["epsilon"])
    want = layer.apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.parametrize("norm", ["bn", "ghost", "renorm", "group", "instance", "layer", "rms"])
def test_what_a_mask_leaves_out(norm):
    """It has no part in the statistics over positions, and in the others none at all."""
    x = IMAGES.reshape(8, 6, 4)
    mask = jnp.arange(6)[None, :, None] < 4
    bad = jnp.where(mask, x, 1e3)
    y, new, _ = one_layer(bad, norm, mask=mask)
    want, new_want, _ = one_layer(x[:, :4], norm)
    np.testing.assert_allclose(y[:, :4], want, atol=1e-5)
    assert_close(new, new_want)


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_examples_that_are_masked_are_normalised(norm):
    mask = (jnp.arange(8) < 6).reshape(8, 1, 1, 1)
    y, *_ = one_layer(IMAGES, norm, mask=mask)
    want, *_ = one_layer(IMAGES, norm)
    np.testing.assert_allclose(y, want, atol=1e-5)


@each_norm
def test_dtypes_are_those_of_the_batch_norm(norm):
    name, options = norm.split(" ")[0], CASES[norm][0]
    for x, fields in [(IMAGES, {"dtype": jnp.bfloat16}), (IMAGES.astype(jnp.bfloat16), {})]:
        y, *_ = one_layer(x, name, fields=fields, options=options)
        want, *_ = one_layer(x, "flax", fields=fields)
        assert (y.shape, y.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("norm", ["none", "layer", "dyt", "bn"])
def test_what_our_layer_is_given_in_the_call(norm):
    """Scale and bias of each example, an activation, and statistics that stay."""
    plain, *_ = one_layer(IMAGES, norm, fields={"use_scale": False, "use_bias": False})
    scale, bias = jnp.full((8, 1, 1, 4), 2.0).at[0].set(3), jnp.ones(4)
    fields = {"use_scale": False, "use_bias": False, "activation": nn.relu}
    call = {"scale": scale, "bias": bias, "update_stats": False}
    y, new, old = one_layer(IMAGES, norm, fields=fields, **call)
    want = nn.relu(plain * (1 if norm == "none" else scale) + 1)
    np.testing.assert_allclose(y, want, atol=1e-2 if norm == "dyt" else 1e-4)
    jax.tree.map(np.testing.assert_array_equal, new, old)
    with pytest.raises(ValueError, match="scale given"):
        one_layer(IMAGES, norm, scale=scale)


def test_statistics_of_replicas():
    """Those of the batch are of all; those of an example need no axis that is bound."""
    fields = {"axis_name": "batch"}
    parts = IMAGES.reshape(2, 4, *IMAGES.shape[1:])
    mapped = jax.vmap(lambda x: one_layer(x, "bn", fields=fields)[0], axis_name="batch")
    want, *_ = one_layer(IMAGES, "bn")
    np.testing.assert_allclose(mapped(parts).reshape(want.shape), want, atol=1e-5)
    y, *_ = one_layer(IMAGES, "layer", fields=fields)
    np.testing.assert_array_equal(y, one_layer(IMAGES, "layer")[0])


@each_norm
def test_variables_are_those_of_before(norm):
    """The same tree and values, but for what a norm has of its own."""
    name, options = norm.split(" ")[0], CASES[norm][0]
    before = LinenNet().init(jax.random.key(0), VECTORS)
    variables = swap(LinenNet(), name, **options).init(jax.random.key(0), IMAGES)
    own = {"dyt": ("params", "alpha"), "renorm": ("batch_stats", "count")}.get(name)
    if own:
        assert not variables[own[0]]["bn"].pop(own[1]).shape
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    module = NnxNet(nnx.Rngs(0))
    state = nnx.state(swap(module, name, **options))
    added = dict(nnx.to_flat_state(state)).keys() - dict(nnx.to_flat_state(nnx.state(module)))
    assert added == ({("bn", own[1])} if own else set())


def test_the_module_that_is_swapped_stays_as_it_was():
    module = NnxNet(nnx.Rngs(0))
    want = module(VECTORS)
    swapped = swap(module, "dyt")
    swapped.a.kernel[...] = 0 * swapped.a.kernel[...]
    np.testing.assert_array_equal(module(VECTORS), want)
    assert type(module.bn) is nnx.BatchNorm


@pytest.mark.parametrize("norm", ["dyt", "renorm"])
def test_variables_that_a_checkpoint_lacks_are_named(norm):
    variables = LinenNet().init(jax.random.key(0), VECTORS)
    name = {"dyt": "alpha", "renorm": "count"}[norm]
    with pytest.raises(ValueError, match=rf"^bn has no {name} for {norm}: take it"):
        swap(LinenNet(), norm).apply(variables, VECTORS, train=False)


class Block(nn.Module):
    """A step of a scan, or a layer of a network written out."""

    norm: type

    @nn.compact
    def __call__(self, x, train):
        y = nn.Dense(8, name="a")(x)
        return nn.tanh(self.norm(name="bn")(y, use_running_average=not train)), None


class Blocks(nn.Module):
    norm: type
    scanned: bool

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(8, name="first")(x)
        if self.scanned:
            block = nn.scan(
                nn.remat(Block, static_argnums=(2,)),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True}, in_axes=nn.broadcast, length=2,
            )  # fmt: skip
            return block(self.norm, name="blocks")(x, train)[0]
        for i in range(2):
            x, _ = Block(self.norm, name=f"block{i}")(x, train)
        return x


@pytest.mark.parametrize("norm", ["layer", "dyt", "renorm"])
def test_within_scan_and_remat_and_vmapped_over_seeds(norm):
    """The same as the network that is written out, of each seed."""
    model = swap(Blocks(functools.partial(nn.BatchNorm, **STATS), True), norm, **CASES[norm][0])
    target = Blocks(CASES[norm][1], False)
    keys = jax.random.split(jax.random.key(0), 3)
    variables = drawn(jax.eval_shape(jax.vmap(model.init, (0, None)), keys, VECTORS))

    def unrolled(variables):
        def one(values):
            same = {n: v for n, v in values.items() if n != "blocks"}
            steps = {f"block{i}": jax.tree.map(lambda v, i=i: v[i], values["blocks"])
                     for i in range(2)}  # fmt: skip
            return same | steps

        return {kind: one(values) for kind, values in variables.items()}

    def trained(f, variables):
        def loss(params):
            given = {**variables, "params": params}
            y, new = f.apply(given, VECTORS, mutable=["batch_stats"])
            return jnp.mean(jnp.sin(y)), (y, new or {"batch_stats": variables["batch_stats"]})

        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return *aux, {"params": grads}

    def pair(variables):
        y, new, grads = trained(model, variables)
        return (y, unrolled(new), unrolled(grads)), trained(target, unrolled(variables))

    if norm == "layer":  # written without statistics
        got, want = jax.jit(jax.vmap(pair))(variables)
        return assert_close((got[0], got[2]), (want[0], want[2]))
    assert_close(*jax.jit(jax.vmap(pair))(variables))


class NnxBlocks(nnx.Module):
    """Two layers by vmap, called by scan."""

    def __init__(self, rngs, scanned=True):
        self.scanned, make = scanned, lambda rngs: NnxBlock(rngs)
        self.blocks = nnx.vmap(make)(rngs.split(2))

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.RngState: None, ...: 0})

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        return run(self.blocks, x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs, **STATS)

    def __call__(self, x):
        return nnx.tanh(self.bn(self.a(x)))


@pytest.mark.parametrize("norm", ["layer", "dyt", "renorm", nnx.LayerNorm])
def test_nnx_layers_that_are_scanned(norm):
    """The same as one after another, each swapped by itself; jitted."""
    options = CASES.get(norm, ({},))[0]
    model = NnxBlocks(nnx.Rngs(0))
    graphdef, state = nnx.split(model.blocks)
    x = VECTORS
    for i in range(2):
        one = swap(
            nnx.merge(graphdef, jax.tree.map(lambda v, i=i: v[i], state)), norm, **options
        )
        x = one(x)
    swapped = swap(model, norm, **options)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(swapped, VECTORS), x, atol=1e-5)
    last = jax.tree.map(lambda v: v[1], nnx.state(swapped.blocks, nnx.BatchStat))
    assert_close(last, nnx.state(one, nnx.BatchStat))


@both_homes
@pytest.mark.parametrize("norm", ["bn", "ghost", "renorm"])
def test_what_is_still_a_batch_norm_is_folded_and_frozen(home, norm):
    model, variables, call = split_swap(home, norm, CASES[norm][0])
    folded = fold(*evaluated(model, variables), VECTORS, **call[1])
    assert (folded.refused, folded.difference < 1e-5) == ({}, True)
    frozen = freeze(model, variables, normalize="*", keep="*")
    y, new = run_split(frozen, variables, call[0])
    want, _ = run_split(*evaluated(model, variables), call[1])
    np.testing.assert_allclose(y, want, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, new, variables)
    if norm != "bn":
        batches = VECTORS.reshape(2, 4, 4), jnp.zeros((2, 4, 3))
        with pytest.raises(ValueError, match=r"normalises by more, or less"):
            accumulate_exactly(model, variables, squares, batches, **call[0])


@both_homes
def test_what_is_none_is_left_alone(home):
    model, variables, call = split_swap(home, "layer", {})
    folded = fold(*evaluated(model, variables), VECTORS, **call[1])
    assert [*folded.refused] == [("bn",)]
    with pytest.raises(ValueError, match="calls no BatchNorm"):
        recalibrate(model, variables, [VECTORS], **call[0])
    frozen = freeze(model, variables, normalize="*", keep="*")
    got, want = (run_split(m, variables, call[0]) for m in (frozen, model))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    batches = VECTORS.reshape(2, 4, 4), jnp.ones((2, 4, 3))
    for function in (accumulate, accumulate_exactly):
        _, _, new = function(model, variables, squares, batches, **call[0])
        jax.tree.map(np.testing.assert_array_equal, new, variables)


def squares(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def split_swap(home, norm, options):
    """A swapped model in training, its variables, and its calls in both modes."""
    if home == "linen":
        model = swap(LinenNet(), norm, **options)
        variables = drawn(jax.eval_shape(model.init, jax.random.key(0), VECTORS))
        return model, variables, ({"train": True}, {"train": False})
    graphdef, state = nnx.split(swap(NnxNet(nnx.Rngs(0)), norm, **options))
    return graphdef, drawn(state), ({}, {})


def evaluated(model, variables):
    if not isinstance(model, nnx.GraphDef):
        return model, variables
    module = nnx.merge(model, variables, copy=True)
    module.eval()
    return nnx.split(module)


def run_split(model, variables, call):
    if isinstance(model, nnx.GraphDef):
        module = nnx.merge(model, variables, copy=True)
        return module(VECTORS), nnx.state(module)
    y, new = model.apply(variables, VECTORS, mutable=["batch_stats"], **call)
    return y, {**variables, **new}


def test_recalibrated_it_has_the_statistics_of_what_it_sees():
    """Of a network half of whose layers are swapped, those that are not."""
    model = ResNet((1, 1), BasicBlock, num_classes=3)
    x = jnp.asarray(RNG.normal(size=(4, 16, 16, 3)), jnp.float32)
    swapped = swap(model, "layer", only="BasicBlock_0/*")
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    new = recalibrate(swapped, variables, [x], train=True)["batch_stats"]
    old = variables["batch_stats"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), new, old)
    assert all(jax.tree.leaves(same["BasicBlock_0"]))
    assert not any(jax.tree.leaves({**same, "BasicBlock_0": {}}))
    _, after = swapped.apply(variables, x, mutable=["batch_stats"])
    want = jax.tree.map(lambda o, n: (n - 0.9 * o) / 0.1, old, after["batch_stats"])
    del new["BasicBlock_0"], want["BasicBlock_0"]
    assert_close(new, want, 1e-3)


@both_homes
def test_of_several_swaps_the_last_counts(home):
    def run(*swaps, freezing=None):
        model = LinenNet() if home == "linen" else NnxNet(nnx.Rngs(0))
        for norm in swaps:
            model = swap(model, norm)
        if home == "linen":
            variables = model.init(jax.random.key(0), VECTORS)
            return jax.tree.structure(variables), model.apply(variables, VECTORS, False)
        model.eval()
        return None, model(VECTORS)

    for one, other in [("layer", "rms"), ("dyt", "layer"), ("layer", "flax"), ("bn", "dyt")]:
        got, want = run(one, other), run(other)
        np.testing.assert_array_equal(got[1], want[1])
        if home == "linen":
            assert got[0] == want[0]


@both_homes
def test_frozen_before_it_is_swapped(home):
    model, variables, call = split_swap(home, "flax", {})
    frozen = freeze(model, variables, normalize="*", keep="*")
    if home == "nnx":
        swapped, state = nnx.split(swap(nnx.merge(frozen, variables, copy=True), "ghost"))
    else:
        swapped, state = swap(frozen, "ghost"), variables
    got, want = run_split(swapped, state, call[0]), run_split(frozen, variables, call[0])
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, got[1], variables)


@both_homes
def test_it_pickles(home):
    for norm in ("dyt", nn.LayerNorm if home == "linen" else nnx.LayerNorm):
        model, variables, call = split_swap(home, norm, {})
        copy = pickle.loads(pickle.dumps(model))
        got, want = (run_split(m, variables, call[0]) for m in (copy, model))
        jax.tree.map(np.testing.assert_array_equal, got, want)


@both_homes
@pytest.mark.parametrize("scaled", [True, False])
def test_a_function_of_ones_own(home, scaled):
    def clipped(x, scale, bias, *, train):
        return jnp.clip(x, -1, 1) * scale + (bias if train else bias + 1)

    if home == "linen":
        layer = nn.BatchNorm(use_running_average=False, use_scale=scaled)
        model, variables = with_variables(layer, IMAGES)
        swapped = swap(model, clipped)
        y = swapped.apply(variables, IMAGES)
        scale, bias = variables["params"].get("scale", jnp.ones(4)), variables["params"]["bias"]
    else:
        layer = nnx.BatchNorm(4, use_scale=scaled, rngs=nnx.Rngs(0))
        layer.bias[...] += 2
        swapped = swap(layer, clipped)
        y, scale, bias = swapped(IMAGES), jnp.ones(4), layer.bias[...]
        swapped.eval()
        np.testing.assert_allclose(swapped(IMAGES), y + 1, atol=1e-6)
    want = np.clip(IMAGES, -1, 1) * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_allclose(y, want, atol=1e-6)


class OwnLayer(nn.Module):
    """A layer with a mode, a mask and a variable of its own, and the scale of the BatchNorm."""

    @nn.compact
    def __call__(self, x, *, deterministic, mask=None):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        power = self.param("power", nn.initializers.constant(2.0), ())
        x = x if deterministic else jnp.abs(x) ** power
        x = x if mask is None else x * mask
        return x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class OwnNnxLayer(nnx.Module):
    def __init__(self, features, rngs):
        self.scale, self.power = nnx.Param(jnp.zeros(features)), nnx.Param(jnp.array(2.0))
        self.deterministic = False

    def __call__(self, x, mask=None):
        x = x if self.deterministic else jnp.abs(x) ** self.power[...]
        x = x if mask is None else x * mask
        return x * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))


@both_homes
@pytest.mark.parametrize("train", [True, False])
def test_a_layer_class_of_ones_own(home, train):
    x, mask = IMAGES, (jnp.arange(8) < 6).reshape(8, 1, 1, 1)
    if home == "linen":
        model = swap(nn.BatchNorm(use_running_average=not train), OwnLayer)
        variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
        assert variables["params"].keys() == {"scale", "bias", "power"}
        y, scale = model.apply(variables, x, mask=mask), variables["params"]["scale"]
        power = variables["params"]["power"]
    else:
        model = swap(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), OwnNnxLayer)
        model.scale[...] += 1
        model.train() if train else model.eval()
        y, scale, power = model(x, mask=mask), model.scale[...], 2.0
        grads = nnx.grad(lambda m: m(x).sum())(model)
        assert grads["scale"][...].any()
    want = np.where(mask, np.abs(x) ** power if train else x, 0) * np.asarray(scale)
    np.testing.assert_allclose(y, want, rtol=1e-5)


def test_a_class_of_batch_norms():
    """It is one to other operations too."""
    fields = {"group_size": 4, **STATS}
    model = swap(LinenNet(), functools.partial(bn_jax.linen.GhostBatchNorm, **fields))
    target = LinenNet(functools.partial(bn_jax.linen.GhostBatchNorm, **fields))
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), VECTORS))
    for train in (True, False):
        got, want = (m.apply(variables, VECTORS, train=train, mutable=["batch_stats"])
                     for m in (model, target))  # fmt: skip
        assert_close(got, want)
    assert_close(*(recalibrate(m, variables, [VECTORS], train=True) for m in (model, target)))


def test_layers_of_another_shape_are_refused():
    class Wide(nnx.Module):
        def __init__(self, features, rngs):
            self.scale = nnx.Param(jnp.ones(2 * features))

    with pytest.raises(
        ValueError, match=r"^bn has scale of shape \(8,\), and Wide of shape \(16"
    ):
        swap(NnxNet(nnx.Rngs(0)), Wide)


@both_homes
def test_patterns(home):
    """Only what fits computes something else."""
    two = Two() if home == "linen" else NnxTwo()
    for only, changes in [
        ("first", "first"),
        (["n?st", "second"], None),
        ("*", "first second"),
    ]:
        if changes is None:
            with pytest.raises(
                ValueError, match=r"no BatchNorm fits 'n\?st': there are first, sec"
            ):
                ran(swap(two, lambda x, *_, train: 0 * x, only))
            continue
        got, want = ran(swap(two, lambda x, *_, train: 0 * x, only)), ran(two)
        for name in ("first", "second"):
            assert np.array_equal(got[name], want[name]) is (name not in changes)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {
            n: nn.BatchNorm(use_running_average=False, name=n)(x) for n in ("first", "second")
        }


class NnxTwo(nnx.Module):
    def __init__(self):
        self.first, self.second = (nnx.BatchNorm(4, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return {"first": self.first(x), "second": self.second(x)}


def ran(model):
    if isinstance(model, nnx.Module):
        return model(VECTORS)
    return model.init_with_output(jax.random.key(0), VECTORS)[0]


@pytest.mark.parametrize("own", OWN_NORMS)
@pytest.mark.parametrize("norm", ["bn", "layer", "renorm"])
def test_classes_of_other_projects(own, norm):
    """With their Adapter; refused by their name without."""
    build, adapters = OWN_NORMS[own]
    model, variables, call = build()
    nnx_model = isinstance(model, nnx.GraphDef)
    start = nnx.merge(model, variables) if nnx_model else model
    with pytest.raises(ValueError, match="is of no known class"):
        run_own(swap(start, norm), variables, call)
    swapped = swap(start, norm, batch_norms=adapters)
    y, new = run_own(swapped, variables, call)
    (adapter,) = adapters.values()
    home = bn_jax.linen
    fields = {"epsilon": 1e-3, "momentum": 0.7, "use_bias": False}
    layer = {
        "bn": home.BatchNorm(use_running_average=False, **fields),
        "renorm": home.BatchRenorm(use_running_average=False, **fields),
        "layer": nn.LayerNorm(epsilon=1e-3, use_bias=False),
    }[norm]
    old = plain_own(adapter, variables)
    given = {"params": {"scale": old["scale"]}}
    stats = {n: old[n] for n in ("mean", "var")} | {"count": jnp.int32(0)}
    if norm != "layer":
        given["batch_stats"] = {n: v for n, v in stats.items() if n != "count" or norm != "bn"}
    want, want_new = layer.apply(given, OWN_X, mutable=["batch_stats"])
    np.testing.assert_allclose(y, want, atol=1e-5)
    got = plain_own(adapter, new)
    for n in ("mean", "var"):
        np.testing.assert_allclose(got[n], want_new.get("batch_stats", stats)[n], rtol=1e-5)


def run_own(model, variables, call):
    if isinstance(model, nnx.Module):
        return model(OWN_X), nnx.state(model)
    own = model.init(jax.random.key(0), OWN_X, **call)
    if "count" in own["batch_stats"]["norm"]:
        variables["batch_stats"]["norm"]["count"] = jnp.int32(0)
    y, new = model.apply(variables, OWN_X, mutable=["batch_stats"], **call)
    return y, {**variables, **new}


def plain_own(adapter, variables):
    """The variables of the layer by our names."""
    leaves = by_layer(variables, nnx.Variable)[("norm",)]
    return adapter.ours(leaves)


def test_what_makes_no_sense_is_refused():
    model = LinenNet()
    for norm, error, match in [
        ("batch", ValueError, r"^norm='batch' is none of none, bn, layer, .* and flax$"),
        (nn.LayerNorm(), TypeError, r"^norm is a LayerNorm: say a name, .* of flax.linen$"),
        (nnx.LayerNorm, TypeError, r"^norm is LayerNorm: say .* a class of flax.linen$"),
        (32, TypeError, r"^norm is a int"),
    ]:
        with pytest.raises(error, match=match):
            swap(model, norm)
    for options, norm, match in [
        ({"groups": 3}, "group", r"^group has options \['num_groups'\], not groups$"),
        ({"groups": 3}, "flax", r"^flax has options \[\], not groups$"),
        ({"groups": 3}, nn.GroupNorm, "^groups: .* use partial$"),
    ]:
        with pytest.raises(ValueError, match=match):
            swap(model, norm, **options)
    with pytest.raises(TypeError, match=r"^GraphDef is no Linen module .* swap nnx.merge"):
        swap(nnx.graphdef(NnxNet(nnx.Rngs(0))), "layer")
    for wrong, norm, match in [
        (nn.Dense(3), "layer", r"no BatchNorm fits '\*': there are none"),
        (model, "instance", r"one element to normalise over in an input of shape \(8, 8\)"),
        (model, lambda x, *_, train: x[:2], r"the norm makes \(2, 8\) of an input of shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            swap(wrong, norm).init(jax.random.key(0), VECTORS)
    with pytest.raises(ValueError, match="8 channels do not split into 3 groups"):
        swap(model, "group", num_groups=3).init(jax.random.key(0), VECTORS)
