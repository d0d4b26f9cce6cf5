"""Hooks around the calls of layers: whatever jit caches, threads, classes and pickles do."""

import copy
import functools
import pickle
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from foreign_norms import NORMS, OwnNet, OwnNorm
from models import Layer, chain, drawn, in_nnx, norm, output, with_variables

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import Adapter, recalibrate
from bn_jax.surgery.intercept import apply, apply_and_update, intercept, known
from bn_jax.surgery.tree import layer_leaves

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(5, 3, (8, 3)), jnp.float32)
both_homes = pytest.mark.parametrize("home", ["linen", "nnx"])


def by_running_statistics(call):
    return call.proceed(True)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, name="norm")(x)


class JittedMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, name="norm")(x)


class Outer(nn.Module):
    block: type = nn.jit(Block)

    @nn.compact
    def __call__(self, x):
        return self.block(name="inner")(x)


class OfFunction(nn.Module):
    """`nn.jit` of a function, called with its own module and with a child."""

    @nn.compact
    def __call__(self, x):
        inner = Block(name="inner")
        x = _CALLED(inner, x)
        return _MINE(self, x)


_CALLED = nn.jit(lambda module, x: module(x))
_MINE = nn.jit(lambda module, x: Block(name="other", parent=module)(x))
JITTED = {
    "class": nn.jit(Block),
    "method": JittedMethod,
    "within jit": nn.jit(Outer),
    "function": OfFunction,
    "norm": nn.jit(functools.partial(nn.BatchNorm, use_running_average=False)),
    "remat": nn.remat(nn.jit(Block)),
}
each_jit = pytest.mark.parametrize("block", JITTED.values(), ids=JITTED)


class Two(nn.Module):
    """Two blocks alike, one after the other."""

    block: type
    before: object = None

    @nn.compact
    def __call__(self, x):
        if self.before is not None:
            self.before()
        return self.block(name="b")(self.block(name="a")(x))


def frozen_at(first):
    def hook(call):
        return call.proceed(True if call.path[0] == first else None)

    return hook


def moved(model, variables):
    """The paths of the blocks whose statistics move in a call."""
    _, new = model.apply(variables, X, mutable=["batch_stats"])
    old, new = (traverse_util.flatten_dict(v["batch_stats"]) for v in (variables, new))
    return {path[0] for path, v in old.items() if not np.array_equal(v, new[path])}


@each_jit
def test_nn_jit_tells_models_and_paths_apart(block):
    """Whatever is in its cache: blocks alike, hooks alike, the model without hooks."""
    model = Two(block)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    models = [
        (model, {"a", "b"}),
        (intercept(model, variables, frozen_at("a")), {"b"}),
        (intercept(model, variables, frozen_at("b")), {"a"}),
        (intercept(model, variables, by_running_statistics), set()),
    ]
    for each, want in [*models, *reversed(models), *models]:
        assert moved(each, variables) == want


@each_jit
def test_nn_jit_in_two_threads(block):
    """A plain model runs, to its end, while another thread is within the frozen one."""
    inside, plain_done = threading.Event(), threading.Event()
    me = threading.current_thread()

    def wait():
        if threading.current_thread() is not me:
            inside.set()
            assert plain_done.wait(60)

    model = Two(block, wait)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    frozen = intercept(model, variables, by_running_statistics)
    found = []
    thread = threading.Thread(target=lambda: found.append(moved(frozen, variables)))
    thread.start()
    assert inside.wait(60)
    assert moved(model, variables) == {"a", "b"}
    plain_done.set()
    thread.join()
    assert found == [set()]


def test_nn_jit_of_the_method_that_is_applied():
    block = Block()
    variables = drawn(jax.eval_shape(block.init, jax.random.key(0), X))
    frozen = intercept(block, variables, by_running_statistics)
    for model, moves in ((block, True), (frozen, False), (block, True)):
        _, new = model.apply(variables, X, mutable=["batch_stats"], method=_CALLED)
        old, new = (v["batch_stats"]["norm"]["mean"] for v in (variables, new))
        assert np.array_equal(old, new) is not moves


def test_nn_jit_is_traced_once():
    calls = []

    def hook(call):
        calls.append(call.path)
        return call.proceed()

    model = Two(JITTED["class"])
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    seen = intercept(model, variables, hook)
    for _ in range(3):
        seen.apply(variables, X, mutable=["batch_stats"])
    assert len(calls) == 2


class Classifier(nn.Module):
    width: int = 4
    act: object = np.positive

    def setup(self):
        self.dense = nn.Dense(self.width)
        self.norm = bn_jax.linen.BatchNorm(use_running_average=False)

    def __call__(self, x):
        return nn.relu(self.features(x))

    def features(self, x):
        return self.norm(self.dense(x))


def zeros(call):
    return jnp.zeros_like(call.x)


@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, "pickle"])
def test_an_intercepted_model_does_what_the_model_does(through):
    model = Classifier()
    variables = model.init(jax.random.key(0), X)
    seen = intercept(model, variables, zeros)
    seen = pickle.loads(pickle.dumps(seen)) if through == "pickle" else through(seen)
    want = np.zeros((8, 4))
    start = seen.init(jax.random.key(0), X)
    assert jax.tree.structure(start["params"]) == jax.tree.structure(
        {"dense": variables["params"]["dense"]}
    )
    np.testing.assert_array_equal(seen.apply(variables, X), want)
    np.testing.assert_array_equal(seen.apply(variables, X, method="features"), want)
    np.testing.assert_array_equal(seen.init_with_output(jax.random.key(0), X)[0], want)
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    jax.tree.map(
        np.testing.assert_array_equal, seen.lazy_init(jax.random.key(0), shapes), start
    )
    bound = seen.bind(variables)
    np.testing.assert_array_equal(bound(X), want)
    np.testing.assert_array_equal(bound.features(X), want)
    np.testing.assert_array_equal(bound.norm(X), np.zeros_like(X))
    assert "Dense" in seen.tabulate(jax.random.key(0), X)
    assert (seen.width, seen.act) == (4, np.positive)
    with pytest.raises(AttributeError, match="height"):
        _ = seen.height


# Hooks.
def doubled(call):
    return 2 * call.proceed()


def increased(call):
    return 1 + call.proceed()


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_shared_layer_is_called_by_one_path():
    """The one that its variables are listed under."""
    paths = []

    def hook(call):
        paths.append(call.path)
        return call.proceed()

    def shared():
        norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        return {"x": nnx.List([norm]), "b": nnx.Dict(r=norm), "z": norm}

    model, variables = with_variables(in_nnx(shared, lambda s, x: s.b.r(x) + s.z(x)))
    output(intercept(model, variables, hook), variables, X)
    assert paths == [("b", "r")] * 2
    assert {path[:-1] for path, _ in nnx.to_flat_state(variables)} == {("b", "r")}


@both_homes
def test_hooks_on_hooks(home):
    """The first is the outermost; the models that were there before stay as they are."""
    model, variables, _ = chain(home, X, Layer("Dense", (5,)), norm(), Layer(nn.relu), norm())
    before, want = jax.tree.map(np.array, variables), output(model, variables, X)
    once = intercept(model, variables, doubled)
    for outermost, both in ((False, lambda y: 2 * (1 + y)), (True, lambda y: 1 + 2 * y)):
        twice = intercept(once, variables, increased, outermost=outermost)
        reference = intercept(model, variables, lambda call, both=both: both(call.proceed()))
        assert_equal(output(twice, variables, X), output(reference, variables, X))
    assert_equal(output(model, variables, X), want)
    assert_equal(variables, before)


def test_an_nnx_module_of_the_caller_keeps_its_class():
    module = nnx.Sequential(nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    hooked = nnx.merge(intercept(graphdef, state, doubled), state)
    assert type(nnx.merge(graphdef, state).layers[0]) is type(module.layers[0]) is nnx.BatchNorm
    assert isinstance(hooked.layers[0], nnx.BatchNorm)
    assert jax.tree.structure(nnx.state(hooked)) == jax.tree.structure(state)


@pytest.mark.parametrize("norms", [nnx.BatchNorm, bn_jax.nnx.BatchNorm, nn.BatchNorm, None])
def test_a_model_that_is_a_norm(norms):
    if norms in (nn.BatchNorm, None):
        layer = (norms or bn_jax.linen.BatchNorm)(use_running_average=True)
        model, variables = with_variables(layer, X)
    else:
        model, variables = with_variables(
            lambda: norms(3, use_running_average=True, rngs=nnx.Rngs(0))
        )
    hooked = intercept(model, variables, doubled)
    assert_equal(output(hooked, variables, X), 2 * output(model, variables, X))
    assert_equal(apply(hooked, variables, X), 2 * output(model, variables, X))


@pytest.mark.parametrize("subject", NORMS)
def test_adapters(subject):
    """A class of the project's own is read like Flax's: mode, input, settings, names."""
    make, batch_norms = NORMS[subject]
    model, variables, training = make()
    calls = []

    def hook(call):
        calls.append(call)
        assert call.axis in (-1, (-1,), 1)
        assert (call.epsilon, call.momentum) == (pytest.approx(1e-3), pytest.approx(0.7))
        return call.proceed(True)

    seen = intercept(model, variables, hook, known(batch_norms))
    y, after = apply_and_update(seen, variables, X, **training)
    inference = {k: not v for k, v in training.items()}
    want = output(_evaluation(model, variables), variables, X, **inference)
    np.testing.assert_allclose(y, want, 1e-6)
    assert [call.use_running_average for call in calls] == [False]
    stats = [layer_leaves(model, v, nnx.BatchStat) for v in (variables, after)]
    jax.tree.map(np.testing.assert_array_equal, *stats)


def _evaluation(model, variables):
    if isinstance(model, nn.Module):
        return model
    module = nnx.merge(model, variables, copy=True)
    module.eval()
    return nnx.graphdef(module)


@pytest.mark.parametrize("subject", NORMS)
def test_a_class_that_nobody_knows_is_named(subject):
    make, batch_norms = NORMS[subject]
    model, variables, training = make()
    name = next(iter(batch_norms)).__name__
    with pytest.raises(
        ValueError, match=rf"norm, a foreign_norms.{name},.*batch_norms={{{name}: Adapter"
    ):
        recalibrate(model, variables, [X], **training)
    none = dict.fromkeys(batch_norms)
    with pytest.raises(ValueError, match="no BatchNorm"):
        recalibrate(model, variables, [X], batch_norms=none, **training)


class Renamed(nn.BatchNorm):
    """A subclass with an argument of its own, in the place of Flax's."""

    @nn.compact
    def __call__(self, x, train):
        return super().__call__(x, use_running_average=not train)


class Rewritten(nn.BatchNorm):
    """A subclass that does not call Flax's."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1])
        self.variable("batch_stats", "var", jnp.ones, x.shape[-1])
        return x - mean.value[None]


class NnxRenamed(nnx.BatchNorm):
    def __call__(self, x, train):
        return super().__call__(x, use_running_average=not train)


class NnxRewritten(nnx.BatchNorm):
    def __call__(self, x, use_running_average=None):
        return x - self.mean[...][None]


@both_homes
def test_a_subclass_is_met_where_it_calls_flax(home):
    if home == "linen":
        model = Renamed()
        variables = model.init(jax.random.key(0), X, train=True)
    else:
        model, variables = nnx.split(NnxRenamed(3, rngs=nnx.Rngs(0)))
    seen = []

    def hook(call):
        seen.append((call.path, call.use_running_average, call.x.shape))
        return call.proceed()

    for train in (True, False):
        apply_and_update(intercept(model, variables, hook), variables, X, train=train)
    assert seen == [((), False, X.shape), ((), True, X.shape)]
    got = recalibrate(model, variables, [X], train=True)
    np.testing.assert_allclose(layer_leaves(model, got)[()]["mean"], np.mean(X, 0), 1e-5)


@both_homes
def test_a_subclass_that_does_not_call_flax_is_named(home):
    if home == "linen":
        model = Rewritten()
        variables = model.init(jax.random.key(0), X)
    else:
        model, variables = nnx.split(NnxRewritten(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"the model itself, a .*Rewritten.*batch_norms"):
        recalibrate(model, variables, [X])
    adapters = {type(model) if home == "linen" else NnxRewritten: Adapter()}
    got = recalibrate(model, variables, [X], batch_norms=adapters)
    np.testing.assert_allclose(layer_leaves(model, got)[()]["mean"], np.mean(X, 0), 1e-5)


def test_what_the_adapter_names_must_be_there():
    model = OwnNet(OwnNorm)
    variables = model.init(jax.random.key(0), X, train=True)

    def recalibrated(adapter):
        return recalibrate(model, variables, [X], batch_norms={OwnNorm: adapter}, train=True)

    with pytest.raises(ValueError, match=r"no attribute 'axis': say Adapter\(axis="):
        recalibrated(Adapter(mode="train", training=True))


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.SpectralNorm(nn.Dense(3))(x, update_stats=train)
        return nn.BatchNorm(use_running_average=not train)(x)


def test_spectral_norm_has_batch_stats_and_is_known():
    model = Spectral()
    variables = model.init(jax.random.key(0), X, train=False)
    got = recalibrate(model, variables, [X], train=True)["batch_stats"]
    jax.tree.map(
        np.testing.assert_array_equal,
        got["SpectralNorm_0"],
        variables["batch_stats"]["SpectralNorm_0"],
    )


def test_a_module_in_place_of_a_graphdef():
    module = bn_jax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"BatchNorm is an nnx.Module: pass graphdef"):
        recalibrate(module, nnx.state(module), [X])
    with pytest.raises(TypeError, match=r"str is no Linen module and no nnx.GraphDef"):
        recalibrate("model", {}, [X])
