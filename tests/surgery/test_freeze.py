"""BatchNorms that stand still, and the masks that keep an optimizer off parameters."""

import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from foreign_norms import NORMS, OwnNorm
from models import Layer, chain, compact, norm, output, with_variables

import bn_jax
import bn_jax.linen
import bn_jax.nnx
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
    """Three steps, each layer called by itself in training and in evaluation."""
    norm = layer_class("linen", kind)()

    def one(layer, x, params, stats):
        own = {n: v for (p, n), v in params.items() if p == layer}
        before = {n: v for (p, n), v in stats.items() if p == layer}
        given = {"params": own, "batch_stats": before}
        y, new = norm.apply(given, x, use_running_average=False, mutable=["batch_stats"])
        if layer in fixed:
            y = norm.apply(given, x, use_running_average=True)
        after = before if layer in kept else new["batch_stats"]
        return y, {(layer, n): v for n, v in after.items()}

    def loss(params, stats, x):
        h, first = one("first", x @ params["a", "kernel"], params, stats)
        y, second = one("second", jnp.tanh(h) @ params["b", "kernel"], params, stats)
        return jnp.mean((y - TARGET) ** 2), first | second

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
CASES += [(kind, SWITCHES[2 + i % 2]) for i, kind in enumerate(KINDS) if kind != "ema"]


@both_homes
@pytest.mark.parametrize(("kind", "switches"), CASES, ids=str)
def test_three_steps_layer_by_layer(home, kind, switches):
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
    got, v = plain(recalibrate(frozen, variables, BATCHES)), plain(variables)
    first, h = (
        (v["first", n] for n in ("mean", "var", "scale", "bias")),
        jnp.concatenate(BATCHES),
    )
    h = h @ v["a", "kernel"]
    np.testing.assert_allclose(got["first", "mean"], h.mean(0), 1e-5)
    h = jnp.tanh(bn_jax.normalize(h, *first)) @ v["b", "kernel"]
    np.testing.assert_allclose(got["second", "mean"], h.mean(0), 1e-5)
    np.testing.assert_allclose(got["second", "var"], h.var(0), 1e-4)


@both_homes
def test_fold_a_frozen_model_and_freeze_a_folded_one(home):
    layers = Layer("Dense", (5,)), norm(), Layer(nn.relu)
    model, variables, _ = chain(home, X, *layers, norm())
    want = output(model, variables, X)
    training, _, paths = chain(home, X, *layers, norm(use_running_average=False))
    frozen = freeze(training, variables, normalize="*", keep="*")
    folded = fold(frozen, variables, X)
    assert [p.norm for p in folded.pairs] == [paths[1]]
    np.testing.assert_allclose(output(folded.model, folded.variables, X), want, 1e-5, 1e-5)
    folded = fold(training, variables, X)
    assert matching(folded.variables, "*") == {paths[3]}
    frozen = freeze(folded.model, folded.variables, normalize="*", keep="*")
    np.testing.assert_allclose(output(frozen, folded.variables, X), want, 1e-5, 1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_within_a_scan(remat):
    """Over layers, which share a path: all of them or none, as layer by layer."""

    def block(x, dense, norm):
        return nn.tanh(norm(dense(x)))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            norm = nn.BatchNorm(use_running_average=False, name="norm")
            return block(x, nn.Dense(3, name="dense"), norm), None

    axes = {"params": 0, "batch_stats": 0}
    scanned = nn.scan(
        nn.remat(Block) if remat else Block, variable_axes=axes,
        split_rngs={"params": True}, length=2,
    )  # fmt: skip
    model = compact(lambda x: scanned(name="block")(x, None)[0])
    plain = compact(lambda x: Block(name="1")(Block(name="0")(x, None)[0], None)[0])
    variables = with_variables(model, X)[1]
    written = {
        c: {str(i): jax.tree.map(lambda v, i=i: v[i], v["block"]) for i in range(2)}
        for c, v in variables.items()
    }
    for switches in ({"normalize": "*", "keep": "*"}, {"normalize": "*"}, {"keep": "*"}):
        got, after = freeze(model, variables, **switches).apply(
            variables, X, mutable=["batch_stats"]
        )
        want, each = freeze(plain, written, **switches).apply(
            written, X, mutable=["batch_stats"]
        )
        np.testing.assert_allclose(got, want, 1e-5, 1e-6)
        each = jax.tree.map(lambda *v: jnp.stack(v), *each["batch_stats"].values())
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            after["batch_stats"]["block"], each,
        )  # fmt: skip


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


@both_homes
@pytest.mark.parametrize("pattern", ["*", "first", ["sec*"]], ids=str)
def test_the_masks_in_an_optimizer(home, pattern):
    """Gradients of 1, a rate of 1 and a decay of 0.5."""
    model, variables = build(home, FLAX[home])
    optimizer = optax.chain(
        optax.add_decayed_weights(0.5, mask=decay_mask(variables)),
        optax.sgd(1.0),
        optax.masked(optax.set_to_zero(), frozen_mask(variables, pattern)),
    )
    before = plain(variables)
    if home == "nnx":
        module = nnx.merge(model, variables, copy=True)
        params = nnx.state(module, nnx.Param)
        step = nnx.Optimizer(module, optimizer, wrt=nnx.Param)
        step.update(module, jax.tree.map(jnp.ones_like, params))
        got = plain(nnx.state(module, nnx.Param))
    else:
        params = variables["params"]
        ones = jax.tree.map(jnp.ones_like, params)
        updates, _ = optimizer.update(ones, optimizer.init(params), params)
        got = plain({"params": optax.apply_updates(params, updates), "batch_stats": {}})
    frozen = {(p[0], n) for p in matching(variables, pattern) for n in ("scale", "bias")}
    for path, v in got.items():
        decay = 0.5 if path[1] == "kernel" else 0
        want = before[path] if path in frozen else (1 - decay) * before[path] - 1
        np.testing.assert_allclose(v, want, 1e-6, 1e-6)


def test_masks_of_other_layers_and_of_metadata():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "features"))
    dense = Layer("Dense", (5,), {"kernel_init": init})
    _, variables, _ = chain("linen", X, dense, norm(), Layer("LayerNorm"))
    frozen, decay = frozen_mask(variables), decay_mask(variables)
    for mask, want in ((frozen, {("layers_1", "scale"), ("layers_1", "bias")}),
                       (decay, {("layers_0", "kernel"), ("layers_2", "scale")})):  # fmt: skip
        assert {p for p, v in traverse_util.flatten_dict(mask).items() if v is True} == want
    optimizer = optax.add_decayed_weights(0.5, mask=decay)
    params = variables["params"]
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    kernel = updates["layers_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    np.testing.assert_allclose(kernel.value, 1.5 * params["layers_0"]["kernel"].value, 1e-6)


def test_masks_have_the_parameters_of_unknown_classes():
    variables = {
        "params": {"norm": {"weight": jnp.ones(3)}, "dense": {"kernel": jnp.ones((3, 3))}},
        "batch_stats": {"norm": {"running_mean": jnp.ones(3)}},
    }
    assert frozen_mask(variables) == {"norm": {"weight": True}, "dense": {"kernel": False}}
    assert decay_mask(variables) == {"norm": {"weight": False}, "dense": {"kernel": True}}


def test_masks_without_parameters_are_empty():
    variables = {"batch_stats": {"b": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}
    assert frozen_mask(variables) == decay_mask(variables) == {}
    assert decay_mask({}) == {}
    norm = bn_jax.nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(frozen_mask(nnx.state(norm)))


class Sharing(nnx.Module):
    def __init__(self):
        norm = functools.partial(bn_jax.nnx.BatchNorm, 3, rngs=nnx.Rngs(0))
        self.n, self.m, self.o = norm(), norm(), norm()
        self.m.mean, self.m.scale = self.n.mean, self.n.scale

    def __call__(self, x):
        return self.o(self.m(self.n(x)))


def test_layers_that_share():
    """What is kept for one is kept; a mask has a scale once."""
    model, variables = with_variables(Sharing)
    module = nnx.merge(freeze(model, variables, keep="m"), variables, copy=True)
    module(X)
    before, after = plain(variables), plain(nnx.state(module))
    moved = {p for p, v in before.items() if not np.array_equal(v, after[p])}
    assert moved == {("o", "mean"), ("o", "var")}
    mask = nnx.to_pure_dict(frozen_mask(variables, "n", model))
    at = {(layer, name) for layer, names in mask.items() for name, v in names.items() if v}
    assert len(at) == 2
    assert {("n", "bias")} < at
    assert jax.tree.leaves(decay_mask(variables, model)) == [False] * 5


# Patterns.
PATHS = [("encoder", "norm"), ("encoder", "block_0", "norm"), ("encoder", "block_0", "bn"),
         ("encoder", "block_1", "bn"), ("norm",)]  # fmt: skip
PATTERNS = [
    ("*", 5), ("norm", 1), ("encoder/*", 4), ("encoder/block_?/bn", 2), ("*/norm", 2),
    (["norm", "encoder/block_1/*"], 2), (["*", "norm"], 5), ((), 0),
    ("encoder/block_[1-9]/*", 1),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "number"), PATTERNS, ids=str)
def test_patterns(pattern, number):
    def tree(*leaves):
        return traverse_util.unflatten_dict(
            {(*p, n): jnp.ones(3) for p in PATHS for n in leaves}
        )

    variables = {"params": tree("scale", "bias"), "batch_stats": tree("mean", "var")}
    variables["params"]["dense"] = {"kernel": jnp.ones((3, 3))}
    variables["batch_stats"]["spectral"] = {"kernel/u": jnp.ones(3)}
    assert len(matching(variables, pattern)) == number
    assert sum(jax.tree.leaves(frozen_mask(variables, pattern))) == 2 * number


@both_homes
@pytest.mark.parametrize("pattern", ["third", "First", "first/*", ["*", "third"], ""])
def test_a_pattern_that_fits_nothing_is_refused(home, pattern):
    model, variables = build(home, layer_class(home, "ema"))
    for call in (
        lambda: freeze(model, variables, normalize=pattern),
        lambda: freeze(model, variables, keep=pattern),
        lambda: frozen_mask(variables, pattern),
    ):
        with pytest.raises(
            ValueError, match=r"no BatchNorm fits '.*': there are first, second"
        ):
            call()


def test_a_model_without_batch_norm():
    model, variables, _ = chain("linen", X, Layer("Dense", (5,)))
    with pytest.raises(ValueError, match="there are none"):
        freeze(model, variables, normalize="*")
    assert jax.tree.leaves(decay_mask(variables)) == [False, True]


# Classes of others, and layers in two places.
def stepped(model, variables, **train):
    """What a model returns in training, and its statistics after it."""
    if isinstance(model, nnx.GraphDef):
        module = nnx.merge(model, variables, copy=True)
        return module(X), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    y, new = model.apply(variables, X, mutable=["batch_stats"], **train)
    return y, new["batch_stats"]


def stats(variables):
    if isinstance(variables, nnx.State):
        return nnx.to_pure_dict(nnx.filter_state(variables, nnx.BatchStat))
    return variables["batch_stats"]


@pytest.mark.parametrize("case", NORMS)
def test_a_layer_of_an_unknown_class_is_frozen_or_named(case):
    build, adapters = NORMS[case]
    model, variables, train = build()
    variables = jax.tree.map(lambda v: jnp.abs(v) + 0.2, variables)
    with pytest.raises(ValueError, match=r"^norm, a [\w.]+, has running statistics"):
        stepped(freeze(model, variables, normalize="*"), variables, **train)
    frozen = freeze(model, variables, normalize="*", keep="*", batch_norms=adapters)
    y, after = stepped(frozen, variables, **train)
    jax.tree.map(np.testing.assert_array_equal, after, stats(variables))
    moved, before = stepped(model, variables, **train)
    assert not np.allclose(moved, y)
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, before, stats(variables)))
    if isinstance(model, nn.Module):
        want = model.apply(variables, X, **{k: not v for k, v in train.items()})
        np.testing.assert_allclose(y, want, rtol=1e-6)


def test_a_layer_that_no_pattern_fits_may_be_of_any_class():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, name="ours")(
                OwnNorm(name="own")(x, train)
            )

    model, variables = with_variables(Net(), X, train=True)
    frozen = freeze(model, variables, normalize="ours", keep="ours")
    _, after = stepped(frozen, variables, train=True)
    assert jnp.array_equal(after["ours"]["mean"], variables["batch_stats"]["ours"]["mean"])
    assert not jnp.array_equal(after["own"]["mean"], variables["batch_stats"]["own"]["mean"])
    with pytest.raises(ValueError, match=r"^own, a foreign_norms.OwnNorm"):
        stepped(freeze(model, variables, keep="o*"), variables, train=True)


class Shared(nn.Module):
    """A layer that is called from two places, and two names of one scope."""

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(use_running_average=not train, name="twice")
        x = norm(nn.Dense(3)(norm(nn.Dense(3)(x))))
        return Scoped(name="scoped")(x, train)


class Scoped(nn.Module):
    def setup(self):
        self.norm = bn_jax.linen.BatchNorm()
        nn.share_scope(self, self.norm)

    def __call__(self, x, train):
        return self.norm(x, use_running_average=not train)


def test_linen_layers_of_two_places():
    model, variables = with_variables(Shared(), X, train=True)
    frozen = freeze(model, variables, normalize="*", keep="*")
    y, after = stepped(frozen, variables, train=True)
    jax.tree.map(np.testing.assert_array_equal, after, stats(variables))
    np.testing.assert_allclose(y, model.apply(variables, X, train=False), rtol=1e-6)


@both_homes
def test_frozen_models_pickle(home):
    model, variables = build(home, FLAX[home])
    frozen = freeze(model, variables, normalize="*", keep="*")
    again = pickle.loads(pickle.dumps(frozen))
    np.testing.assert_array_equal(stepped(again, variables)[0], stepped(frozen, variables)[0])
