import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from models import BasicBlock, Layer, ResNet, chain, drawn, norm, output, with_variables

import bn_jax
import bn_jax.linen
import bn_jax.nnx
from bn_jax.core.running import BatchStats, each
from bn_jax.surgery import fold, recalibrate
from bn_jax.surgery.freeze import decay_mask, freeze, frozen_mask, matching

RNG = np.random.default_rng(0)
BATCHES = [jnp.asarray(2 * RNG.normal(size=(8, 3)) + 1, jnp.float32) for _ in range(3)]
TARGET = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
X = BATCHES[0]
# Programs that run three times: to optimise them takes longer than to run them.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
both_homes = pytest.mark.parametrize("home", ["linen", "nnx"])


class LinenNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, use_bias=False, name="a")(x)
        x = nn.tanh(self.norm(name="first")(x, use_running_average=not train))
        x = nn.Dense(4, use_bias=False, name="b")(x)
        return self.norm(use_running_average=not train, name="second")(x)


class NnxNet(nnx.Module):
    def __init__(self, norm, rngs):
        self.a = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.b = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.first, self.second = norm(4, rngs=rngs), norm(4, rngs=rngs)

    def __call__(self, x):
        return self.second(self.b(nnx.tanh(self.first(self.a(x)))))


def build(home, norms):
    if home == "linen":
        return with_variables(LinenNet(norms), X)
    return with_variables(lambda: NnxNet(norms, nnx.Rngs(0)))


def plain(variables):
    """{(layer, name): array} of parameters and statistics, whichever home."""
    if isinstance(variables, nnx.State):
        return {path: v[...] for path, v in nnx.to_flat_state(variables)}
    trees = variables["params"], variables["batch_stats"]
    return {
        (k, n): v for tree in trees for k, leaves in tree.items() for n, v in leaves.items()
    }


def train(model, variables, steps=BATCHES):
    """Plain gradient descent with rate 0.1; the variables, the last loss and its gradients."""

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
    def step(model, variables, x):
        def loss(params):
            if isinstance(variables, nnx.State):
                module = nnx.merge(model, params, others, copy=True)
                return jnp.mean((module(x) - TARGET) ** 2), nnx.state(module, nnx.BatchStat)
            y, new = model.apply({**others, "params": params}, x, mutable=["batch_stats"])
            return jnp.mean((y - TARGET) ** 2), new

        if isinstance(variables, nnx.State):
            params, others = nnx.split_state(variables, nnx.Param, ...)
        else:
            params, others = variables["params"], {"batch_stats": variables["batch_stats"]}
        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        if isinstance(variables, nnx.State):
            return nnx.merge_state(params, new), value, gradients
        return {"params": params, **new}, value, gradients

    for x in steps:
        variables, value, gradients = step(model, variables, x)
    if not isinstance(gradients, nnx.State):
        gradients = {"params": gradients, "batch_stats": {}}
    return plain(variables), value, plain(gradients)


FLAX = {"linen": nn.BatchNorm, "nnx": nnx.BatchNorm}
KINDS = {
    "ema": ("BatchNorm", {"momentum": 0.9, "unbiased": True}),
    "schedule": ("BatchNorm", {"momentum": lambda count: 1 - 0.5 / (1 + count)}),
    "debiased": ("BatchNorm", {"estimator": bn_jax.debiased_ema, "momentum": 0.7}),
    "cumulative": ("BatchNorm", {"estimator": bn_jax.cumulative_mean}),
    "ghost": ("GhostBatchNorm", {"group_size": 4, "momentum": 0.9}),
    "renorm": (
        "BatchRenorm",
        {"r_max": lambda count: 1.5 + count, "d_max": lambda count: 0.5, "momentum": 0.9},
    ),
    "flax": (None, {"momentum": 0.9}),
}
SWITCHES = [
    {},
    {"normalize": "*"},
    {"keep": "*"},
    {"normalize": "*", "keep": "*"},
    {"normalize": "first", "keep": ["second"]},
    {"normalize": ["f*", "sec*"], "keep": "first"},
    {"normalize": "second", "keep": ("first", "second")},
]


def layer_class(home, kind):
    name, fields = KINDS[kind]
    module = bn_jax.linen if home == "linen" else bn_jax.nnx
    layer = FLAX[home] if name is None else getattr(module, name)
    return functools.partial(layer, **fields)


def by_hand(kind, variables, fixed, kept):
    """Three steps of the network written out, out of the functions that layers are made of."""
    name, fields = KINDS[kind]
    fields = dict(fields)
    estimator = functools.partial(
        fields.pop("estimator", bn_jax.ema),
        **{n: fields.pop(n) for n in ("momentum", "unbiased") if n in fields},
    )
    functions = {"GhostBatchNorm": bn_jax.ghost_batch_norm, "BatchRenorm": bn_jax.batch_renorm}
    function = functools.partial(functions.get(name, bn_jax.batch_norm), **fields)

    def one(layer, x, params, stats):
        before = BatchStats(**{"count": jnp.int32(0)} | stats)
        scale, bias = params[layer, "scale"], params[layer, "bias"]
        given = {"stats": before} if name == "BatchRenorm" else {}
        y, batch = function(x, scale=scale, bias=bias, **given)
        update = functools.partial(each, estimator) if name == "GhostBatchNorm" else estimator
        after = update(before, jax.lax.stop_gradient(batch))
        if layer in fixed:
            y = bn_jax.normalize(x, before.mean, before.var, scale, bias)
        after = before if layer in kept else after
        return y, {n: getattr(after, n) for n in stats}

    def loss(params, stats, x):
        of = {k: {n: v for (p, n), v in stats.items() if p == k} for k in ("first", "second")}
        h, first = one("first", x @ params["a", "kernel"], params, of["first"])
        y, second = one("second", jnp.tanh(h) @ params["b", "kernel"], params, of["second"])
        new = {"first": first, "second": second}
        new = {(k, n): v for k, leaves in new.items() for n, v in leaves.items()}
        return jnp.mean((y - TARGET) ** 2), new

    stats = {p: v for p, v in variables.items() if p[1] in ("mean", "var", "count")}
    params = {p: v for p, v in variables.items() if p not in stats}
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)
    for x in BATCHES:
        (value, stats), gradients = step(params, stats, x)
        params = {p: v - 0.1 * gradients[p] for p, v in params.items()}
    return params | stats, value, gradients


def assert_close(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for path, v in want.items():
        assert got[path].dtype == v.dtype
        np.testing.assert_allclose(got[path], v, tolerance, tolerance, err_msg=str(path))


CASES = [("ema", switches) for switches in SWITCHES]
CASES += [(kind, SWITCHES[4 + i % 2]) for i, kind in enumerate(KINDS) if kind != "ema"]


@both_homes
@pytest.mark.parametrize(("kind", "switches"), CASES, ids=str)
def test_three_steps_against_the_equations(home, kind, switches):
    model, variables = build(home, layer_class(home, kind))
    fixed, kept = (
        {path[0] for path in matching(variables, switches.get(name, ()))}
        for name in ("normalize", "keep")
    )
    got = train(freeze(model, variables, **switches), variables)
    want = by_hand(kind, plain(variables), fixed, kept)
    assert_close(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], 1e-5)
    assert_close(got[2], want[2])


@both_homes
def test_inference_is_as_before(home):
    model, variables = build(home, layer_class(home, "ema"))
    frozen = freeze(model, variables, normalize="first", keep="*")
    if home == "linen":
        got, want = (m.apply(variables, X, train=False) for m in (frozen, model))
    else:
        modules = [nnx.merge(m, variables, copy=True) for m in (frozen, model)]
        [module.eval() for module in modules]
        got, want = (module(X) for module in modules)
    np.testing.assert_array_equal(got, want)


def test_normalising_with_what_is_kept_writes_nothing():
    """So the statistics need not be mutable, as for a model at inference."""
    model, variables = build("linen", layer_class("linen", "flax"))
    frozen = freeze(model, variables, normalize="*", keep="*")
    want = model.apply(variables, X, train=False)
    np.testing.assert_array_equal(frozen.apply(variables, X), want)


def test_init_through_the_frozen_model():
    model = LinenNet(bn_jax.linen.BatchNorm)
    variables = jax.jit(model.init)(jax.random.key(3), X)
    for switches in ({"normalize": "*"}, {"keep": "*"}, {"normalize": "*", "keep": "first"}):
        frozen = freeze(model, variables, **switches)
        got = jax.jit(frozen.init)(jax.random.key(3), X)
        jax.tree.map(np.testing.assert_array_equal, got, variables)


def test_train_and_eval_of_nnx_do_not_thaw():
    model, variables = build("nnx", layer_class("nnx", "ema"))
    module = nnx.merge(freeze(model, variables, normalize="*", keep="*"), variables, copy=True)
    inference = nnx.merge(model, variables, copy=True)
    inference.eval()
    for mode in (module.train, module.eval, module.train):
        mode()
        np.testing.assert_array_equal(module(X), inference(X))
    assert_close(plain(nnx.state(module)), plain(variables))


@both_homes
def test_the_callers_model_is_not_frozen(home):
    model, variables = build(home, layer_class(home, "ema"))
    before = {p: np.array(v) for p, v in plain(variables).items()}
    frozen = freeze(model, variables, normalize="*", keep="*")
    train(frozen, variables)
    assert_close(plain(variables), before, 0)
    assert_close(train(model, variables)[0], by_hand("ema", before, (), ())[0])


@both_homes
def test_frozen_twice(home):
    """What either has frozen is."""
    model, variables = build(home, layer_class(home, "ema"))
    once = freeze(model, variables, normalize="first")
    twice = freeze(once, variables, normalize="second", keep="first")
    got = train(twice, variables)[0]
    assert_close(got, by_hand("ema", plain(variables), ("first", "second"), ("first",))[0])
    assert_close(train(once, variables)[0], by_hand("ema", plain(variables), ("first",), ())[0])


@both_homes
def test_recalibrate_a_frozen_model(home):
    """The second layer sees what the first one, frozen, makes of the data."""
    model, variables = build(home, layer_class(home, "ema"))
    frozen = freeze(model, variables, normalize="first", keep="*")
    got = plain(recalibrate(frozen, variables, BATCHES))
    v = {p: np.float64(leaf) for p, leaf in plain(variables).items()}
    x = np.float64(jnp.concatenate(BATCHES))
    h = x @ v["a", "kernel"]
    np.testing.assert_allclose(got["first", "mean"], h.mean(0), 1e-5)
    h = (h - v["first", "mean"]) / np.sqrt(v["first", "var"] + 1e-5)
    h = np.tanh(h * v["first", "scale"] + v["first", "bias"]) @ v["b", "kernel"]
    np.testing.assert_allclose(got["second", "mean"], h.mean(0), 1e-5)
    np.testing.assert_allclose(got["second", "var"], h.var(0), 1e-5)


@both_homes
def test_fold_a_frozen_model(home):
    layers = Layer("Dense", (5,)), norm(), Layer(nn.relu)
    model, variables, _ = chain(home, X, *layers)
    frozen = freeze(model, variables, normalize="*", keep="*")
    folded = fold(frozen, variables, X)
    assert len(folded.pairs) == 1
    got = output(folded.model, folded.variables, X)
    np.testing.assert_allclose(got, output(model, variables, X), 1e-5, 1e-5)


@both_homes
def test_freeze_what_is_left_of_a_folded_model(home):
    layers = Layer("Dense", (5,)), norm(), Layer(nn.relu), norm(use_running_average=False)
    model, variables, paths = chain(home, X, *layers)
    folded = fold(model, variables, X)
    assert matching(folded.variables, "*") == {paths[3]}
    frozen = freeze(folded.model, folded.variables, normalize="*", keep="*")
    layers = Layer("Dense", (5,)), norm(), Layer(nn.relu), norm()
    inference, _, _ = chain(home, X, *layers)
    got = output(frozen, folded.variables, X)
    np.testing.assert_allclose(got, output(inference, variables, X), 1e-5, 1e-5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x)))


Jitted, Rematted = nn.jit(Block), nn.remat(Block)


class Two(nn.Module):
    block: type = Block

    def setup(self):
        self.one, self.two = self.block(), self.block()

    def __call__(self, x):
        return self.two(self.one(x))


@pytest.mark.parametrize("block", [Block, Jitted, Rematted], ids=["plain", "jit", "remat"])
@pytest.mark.parametrize("warm", [False, True])
def test_lifted_layers(block, warm):
    """Of two blocks alike one is frozen, whatever jit has in its caches."""
    model, variables = with_variables(Two(block), X)
    plain = Two()
    if warm:
        model.apply(variables, X, mutable=["batch_stats"])
    for pattern in ("two/*", "one/*"):
        switches = {"normalize": pattern, "keep": pattern}
        got = freeze(model, variables, **switches).apply(variables, X, mutable=["batch_stats"])
        want = freeze(plain, variables, **switches).apply(variables, X, mutable=["batch_stats"])
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want
        )
        name, other = pattern[:3], {"two": "one", "one": "two"}[pattern[:3]]
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), *stats_pair(got, variables))
        assert not any(jax.tree.leaves(moved[name]))
        assert all(jax.tree.leaves(moved[other]))


def stats_pair(applied, variables):
    return applied[1]["batch_stats"], variables["batch_stats"]


@pytest.mark.parametrize("remat", [False, True])
def test_within_a_scan(remat):
    """Over layers, which share a path: all of them or none."""

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(block, x, _):
                return block(x), None

            lifted = nn.scan(
                nn.remat(body) if remat else body,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=2,
            )
            return lifted(Block(name="block"), x, None)[0]

    model, variables = with_variables(Layers(), X)
    frozen = freeze(model, variables, normalize="*", keep="*")
    got, new = frozen.apply(variables, X, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])
    h = X
    for i in range(2):
        p = jax.tree.map(lambda v, i=i: v[i], variables["params"]["block"])
        s = jax.tree.map(lambda v, i=i: v[i], variables["batch_stats"]["block"]["BatchNorm_0"])
        h = h @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"].reshape(1, -1)
        h = jnp.tanh(bn_jax.normalize(h, s["mean"], s["var"], **p["BatchNorm_0"]))
    np.testing.assert_allclose(got, h, 1e-5, 1e-5)
    moving = freeze(model, variables, normalize="*")
    same, moved = moving.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(same, got)
    first = jax.tree.map(lambda v: v[0], moved["batch_stats"]["block"]["BatchNorm_0"])
    p, s = (
        jax.tree.map(lambda v: v[0], variables[c]["block"]) for c in ("params", "batch_stats")
    )
    h = X @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"].reshape(1, -1)
    old = BatchStats(*s["BatchNorm_0"].values(), jnp.int32(0))
    want = bn_jax.ema(old, bn_jax.moments(h))
    np.testing.assert_allclose(first["mean"], want.mean, 1e-5)
    np.testing.assert_allclose(first["var"], want.var, 1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_nnx_within_jit_and_remat(remat):
    model, variables = build("nnx", layer_class("nnx", "flax"))
    frozen = freeze(model, variables, normalize="first", keep="first")
    module = nnx.merge(frozen, variables, copy=True)
    call = nnx.jit(nnx.remat(lambda m, x: m(x)) if remat else lambda m, x: m(x))
    unjitted = nnx.merge(frozen, variables, copy=True)
    for x in BATCHES:
        np.testing.assert_allclose(call(module, x), unjitted(x), 1e-5, 1e-5)
    got, want = plain(nnx.state(module)), plain(nnx.state(unjitted))
    assert_close(got, want)
    np.testing.assert_array_equal(got["first", "mean"], plain(variables)["first", "mean"])
    assert np.all(got["second", "mean"] != plain(variables)["second", "mean"])


def test_replicas_that_share_statistics(replicate):
    """The frozen layer takes no part in it, one that still moves does."""
    norms = functools.partial(bn_jax.linen.BatchNorm, axis_name="batch", momentum=0.9)
    model, variables = with_variables(LinenNet(norms), X, train=False)
    frozen = freeze(model, variables, normalize="*", keep="first")

    def step(x):
        return frozen.apply(variables, x, mutable=["batch_stats"])

    y, new = replicate(step)(X.reshape(4, 2, 3))
    single = LinenNet(functools.partial(bn_jax.linen.BatchNorm, momentum=0.9))
    single = freeze(single, variables, normalize="*", keep="first")
    want, moved = single.apply(variables, X, mutable=["batch_stats"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(np.asarray(y).reshape(8, 4), want)
    jax.tree.map(lambda v, w: close(np.asarray(v)[0], w), new, moved)


def test_a_model_someone_else_wrote():
    x = jnp.asarray(RNG.normal(size=(2, 8, 8, 3)), jnp.float32)
    model, variables = with_variables(ResNet((1, 1), BasicBlock), x)
    frozen = freeze(model, variables, normalize="*", keep="BasicBlock_0/*")
    y, new = jax.jit(functools.partial(frozen.apply, mutable=["batch_stats"]))(variables, x)
    np.testing.assert_allclose(y, model.apply(variables, x, train=False), 1e-4, 1e-4)
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), new["batch_stats"], variables["batch_stats"]
    )
    assert not any(jax.tree.leaves(moved["BasicBlock_0"]))
    assert all(jax.tree.leaves(moved["BasicBlock_1"]))
    assert all(jax.tree.leaves(moved["bn_init"]))


# The optimizer.
def optimised(home, variables, model, optimizer, steps=BATCHES):
    """The parameters after some steps."""
    if home == "nnx":
        module = nnx.merge(model, variables, copy=True)
        state = nnx.Optimizer(module, optimizer, wrt=nnx.Param)
        for x in steps:
            loss = nnx.grad(lambda m, x=x: jnp.mean((m(x) - TARGET) ** 2))
            state.update(module, loss(module))
        return plain(nnx.state(module, nnx.Param))
    params, stats = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)
    for x in steps:

        def loss(params, x=x, stats=stats):
            given = {"params": params, "batch_stats": stats}
            y, new = model.apply(given, x, mutable=["batch_stats"])
            return jnp.mean((y - TARGET) ** 2), new["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return plain({"params": params, "batch_stats": {}})


@both_homes
@pytest.mark.parametrize("pattern", ["*", "first", ["sec*"]], ids=str)
def test_the_frozen_mask_in_an_optimizer(home, pattern):
    """Decay included; all others move."""
    model, variables = build(home, layer_class(home, "ema"))
    mask = frozen_mask(variables, pattern)
    zero = optax.masked(optax.set_to_zero(), mask)
    optimizer = optax.chain(optax.adamw(0.1, weight_decay=0.5), zero)
    got, before = optimised(home, variables, model, optimizer), plain(variables)
    frozen = {(p[0], n) for p in matching(variables, pattern) for n in ("scale", "bias")}
    for path, v in got.items():
        unchanged = np.array_equal(v, before[path])
        assert unchanged == (path in frozen), path


@both_homes
def test_the_decay_mask_in_an_optimizer(home):
    """At a rate of 0.1 and a decay of 0.5 adamw takes 0.05 off that adam leaves."""
    model, variables = build(home, layer_class(home, "ema"))
    before, mask = plain(variables), decay_mask(variables)
    decaying = optax.adamw(0.1, weight_decay=0.5, mask=mask)
    got = optimised(home, variables, model, decaying, BATCHES[:1])
    want = optimised(home, variables, model, optax.adam(0.1), BATCHES[:1])
    for path, v in want.items():
        decay = 0.05 * before[path] if path[1] == "kernel" else 0
        np.testing.assert_allclose(got[path], v - decay, 1e-4, 1e-5)


@both_homes
def test_the_masks_name_by_name(home):
    layers = Layer("Dense", (5,)), norm(), Layer("LayerNorm"), Layer("Dense", (2,))

    def make():
        rngs = nnx.Rngs(0)
        norms = nnx.BatchNorm(5, rngs=rngs), nnx.LayerNorm(5, rngs=rngs)
        return nnx.Sequential(nnx.Linear(3, 5, rngs=rngs), *norms, nnx.Linear(5, 2, rngs=rngs))

    _, variables = chain("linen", X, *layers)[:2] if home == "linen" else with_variables(make)

    def true_at(mask):
        flat = mask if isinstance(mask, nnx.State) else traverse_util.flatten_dict(mask)
        flat = nnx.to_flat_state(flat) if isinstance(mask, nnx.State) else flat.items()
        return {(int(str(p[-2])[-1]), p[-1]) for p, v in flat if v is True}

    assert true_at(frozen_mask(variables)) == {(1, "scale"), (1, "bias")}
    assert true_at(decay_mask(variables)) == {(0, "kernel"), (2, "scale"), (3, "kernel")}


def test_masks_of_a_tree_with_metadata():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "features"))
    layers = Layer("Dense", (5,), {"kernel_init": init}), norm()
    _, variables, _ = chain("linen", X, *layers)
    optimizer = optax.chain(
        optax.add_decayed_weights(0.5, mask=decay_mask(variables)),
        optax.masked(optax.set_to_zero(), frozen_mask(variables)),
    )
    params = variables["params"]
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    assert isinstance(updates["layers_0"]["kernel"], nn.Partitioned)
    kernel = params["layers_0"]["kernel"].value
    np.testing.assert_allclose(updates["layers_0"]["kernel"].value, 1 + 0.5 * kernel, 1e-6)
    np.testing.assert_array_equal(updates["layers_0"]["bias"], np.ones(5))
    np.testing.assert_array_equal(updates["layers_1"]["scale"], np.zeros(5))


# Patterns.
TREE = {
    "encoder": {"norm": (3,), "block_0": {"norm": (3,), "bn": (3,)}, "block_1": {"bn": (3,)}},
    "norm": (3,),
}


def of_tree(tree, leaves):
    if isinstance(tree, dict):
        return {name: of_tree(v, leaves) for name, v in tree.items()}
    return {name: jax.ShapeDtypeStruct(tree, jnp.float32) for name in leaves}


PATTERNS = [
    ("*", 5),
    ("norm", 1),
    ("encoder/*", 4),
    ("encoder/block_?/bn", 2),
    ("*/norm", 2),
    (["norm", "encoder/block_1/*"], 2),
    (["*", "norm"], 5),
    ([], 0),
    ((), 0),
    ("encoder/block_[1-9]/*", 1),
]


@pytest.mark.parametrize(("pattern", "number"), PATTERNS, ids=str)
def test_patterns(pattern, number):
    variables = {
        "params": of_tree(TREE, ["scale", "bias"]),
        "batch_stats": of_tree(TREE, ["mean", "var"]),
    }
    variables["params"]["dense"] = {"kernel": jax.ShapeDtypeStruct((3, 3), jnp.float32)}
    variables["batch_stats"]["spectral"] = {"kernel/u": jax.ShapeDtypeStruct((3,), jnp.float32)}
    variables = drawn(variables)
    assert len(matching(variables, pattern)) == number
    assert sum(jax.tree.leaves(frozen_mask(variables, pattern))) == 2 * number


@pytest.mark.parametrize("pattern", ["third", "First", "first/*", ["*", "third"], "a", ""])
@both_homes
def test_a_pattern_that_fits_nothing_is_refused(home, pattern):
    model, variables = build(home, layer_class(home, "ema"))
    name = pattern if isinstance(pattern, str) else "third"
    for call in (
        lambda: freeze(model, variables, normalize=pattern),
        lambda: freeze(model, variables, keep=pattern),
        lambda: frozen_mask(variables, pattern),
    ):
        with pytest.raises(
            ValueError, match=f"no BatchNorm fits '{name.replace('*', '.')}'"
        ) as e:
            call()
        assert "first, second" in str(e.value)


def test_a_model_without_batch_norm():
    model, variables, _ = chain("linen", X, Layer("Dense", (5,)))
    with pytest.raises(ValueError, match="there are none"):
        freeze(model, variables, normalize="*")
    assert jax.tree.leaves(decay_mask(variables)) == [False, True]


@both_homes
def test_a_model_that_is_a_norm(home):
    if home == "linen":
        model, variables = with_variables(nn.BatchNorm(use_running_average=False), X)
    else:
        model, variables = with_variables(lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    frozen = freeze(model, variables, normalize="*", keep="*")
    params, stats = (
        (variables["params"], variables["batch_stats"])
        if home == "linen"
        else (
            {n: variables[n][...] for n in names}
            for names in (("scale", "bias"), ("mean", "var"))
        )
    )
    want = bn_jax.normalize(X, stats["mean"], stats["var"], params["scale"], params["bias"])
    np.testing.assert_allclose(output(frozen, variables, X), want, 1e-5, 1e-5)
    assert jax.tree.leaves(frozen_mask(variables)) == [True, True]
    assert jax.tree.leaves(decay_mask(variables)) == [False, False]


def test_a_layer_of_its_own_making():
    """A subclass, whose call goes through that of its parent."""

    class Scaled(bn_jax.linen.BatchNorm):
        def __call__(self, x, **given):
            return 2 * super().__call__(x, **given)

    model, variables = with_variables(Scaled(use_running_average=False, momentum=0.9), X)
    frozen = freeze(model, variables, normalize="*")
    y, new = frozen.apply(variables, X, mutable=["batch_stats"])
    stats, params = variables["batch_stats"], variables["params"]
    want = 2 * bn_jax.normalize(X, stats["mean"], stats["var"], **params)
    np.testing.assert_allclose(y, want, 1e-5, 1e-5)
    old = BatchStats(**stats, count=jnp.int32(0))
    moved = bn_jax.ema(old, bn_jax.moments(X), momentum=0.9)
    np.testing.assert_allclose(new["batch_stats"]["mean"], moved.mean, 1e-5, 1e-6)
