import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bn_jax.linen
import bn_jax.nnx
from bn_jax.core.population import algorithm_2, pooled
from bn_jax.surgery import recalibrate, reset

RNG = np.random.default_rng(0)
X = (3 * RNG.normal(size=(24, 3)) + 1).astype(np.float32)
# The last is smaller: it must not count like a full one.
BATCHES = [X[:10], X[10:20], X[20:]]


class LinenNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5)(x)
        x = nn.relu(self.norm(use_running_average=not train, name="first")(x))
        x = nn.Dense(4)(x)
        return self.norm(name="second")(x, use_running_average=not train)


class NnxNet(nnx.Module):
    def __init__(self, norm, rngs):
        self.body = nnx.Sequential(
            nnx.Linear(3, 5, rngs=rngs), norm(5, rngs=rngs), nnx.relu,
            nnx.Linear(5, 4, rngs=rngs),
        )  # fmt: skip
        self.tail = nnx.List([norm(4, rngs=rngs)])

    def __call__(self, x):
        return self.tail[0](self.body(x))


def linen(norm):
    """A model, its variables, its call in training, its kernels, the paths of its layers."""
    model = LinenNet(norm)
    variables = model.init(jax.random.key(0), X, train=False)
    kernels = [variables["params"][f"Dense_{i}"]["kernel"] for i in range(2)]
    return model, variables, {"train": True}, kernels, (("first",), ("second",))


def of_nnx(norm):
    model = NnxNet(norm, nnx.Rngs(0))
    kernels = [model.body.layers[i].kernel[...] for i in (0, 3)]
    paths = ("body", "layers", 1), ("tail", 0)
    return *nnx.split(model), {}, kernels, paths


def stats_at(variables, path):
    place = variables if isinstance(variables, nnx.State) else variables["batch_stats"]
    for name in path:
        place = place[name]
    return {name: np.asarray(place[name]) for name in place if name in ("mean", "var", "count")}


SUBJECTS = {
    "linen": (linen, bn_jax.linen.BatchNorm),
    "flax linen": (linen, nn.BatchNorm),
    "linen renorm": (linen, bn_jax.linen.BatchRenorm),
    "nnx": (of_nnx, bn_jax.nnx.BatchNorm),
    "flax nnx": (of_nnx, nnx.BatchNorm),
}
each_subject = pytest.mark.parametrize(("build", "norm"), SUBJECTS.values(), ids=SUBJECTS)


def normalized(h, mean, var):
    return (h - mean) / np.sqrt(var + 1e-5)


def reference(kernels, population, layer_by_layer):
    """(mean, var) of both layers in float64, from the batches as the definitions have them."""
    first = [batch.astype(np.float64) @ np.float64(kernels[0]) for batch in BATCHES]
    estimate_1 = population_of(first, population)
    own = [(h.mean(0), h.var(0)) for h in first]
    seen_by = [estimate_1] * 3 if layer_by_layer else own
    second = [
        np.maximum(normalized(h, *stats), 0) @ np.float64(kernels[1])
        for h, stats in zip(first, seen_by, strict=True)
    ]
    return estimate_1, population_of(second, population)


def population_of(batches, population):
    every = np.concatenate(batches)
    if population is pooled:
        return every.mean(0), every.var(0)
    weights = [len(batch) / len(every) for batch in batches]
    return every.mean(0), sum(
        w * b.var(0, ddof=1) for w, b in zip(weights, batches, strict=True)
    )


@each_subject
@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("population", [pooled, algorithm_2])
def test_against_float64(build, norm, population, layer_by_layer):
    model, variables, call, kernels, paths = build(norm)
    got = recalibrate(
        model, variables, BATCHES, population=population, layer_by_layer=layer_by_layer, **call
    )
    assert jax.tree.structure(got) == jax.tree.structure(variables)
    wanted = reference(kernels, population, layer_by_layer)
    for path, (mean, var) in zip(paths, wanted, strict=True):
        stats = stats_at(got, path)
        np.testing.assert_allclose(stats["mean"], mean, 1e-5, 1e-5)
        np.testing.assert_allclose(stats["var"], var, 1e-5)
        assert stats.get("count", 3) == 3
        assert {v.dtype.name for v in stats.values()} <= {"float32", "int32"}


@each_subject
def test_nothing_else_changes(build, norm):
    model, variables, call, _, paths = build(norm)
    before = jax.tree.map(np.array, variables)
    got = recalibrate(model, variables, iter(BATCHES), **call)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    flat, new = (jax.tree_util.tree_leaves_with_path(v) for v in (before, got))
    moved = [p for (p, a), (_, b) in zip(flat, new, strict=True) if not np.array_equal(a, b)]
    names = {p[-2].key if isinstance(variables, nnx.State) else p[-1].key for p in moved}
    assert names <= {"mean", "var", "count"}
    assert len(moved) >= 2 * len(paths)


@each_subject
def test_reset(build, norm):
    model, variables, call, _, _ = build(norm)
    moved = recalibrate(model, variables, BATCHES, **call)
    got = reset(model, moved, jax.ShapeDtypeStruct(X.shape, X.dtype), **call)
    jax.tree.map(np.testing.assert_array_equal, got, variables)


def test_averaged_weights():
    """Of two models with opposite biases the average has none: neither's statistics fit it."""
    model, variables, call, kernels, _ = linen(bn_jax.linen.BatchNorm)
    moved = [
        {
            **variables,
            "params": jax.tree.map(lambda p, s=sign: p + s * 0.5, variables["params"]),
        }
        for sign in (-1, 1)
    ]
    average = jax.tree.map(lambda *p: sum(p) / 2, *(v["params"] for v in moved))
    got = recalibrate(model, {**moved[0], "params": average}, BATCHES, **call)
    for path, (mean, var) in zip(
        (("first",), ("second",)), reference(kernels, pooled, False), strict=True
    ):
        np.testing.assert_allclose(stats_at(got, path)["mean"], mean, 1e-4, 1e-5)
        np.testing.assert_allclose(stats_at(got, path)["var"], var, 1e-4)


def test_a_batch_over_devices_is_one_batch(make_mesh):
    model, variables, call, kernels, _ = linen(bn_jax.linen.BatchNorm)
    sharding = NamedSharding(make_mesh(batch=4), P("batch"))
    batches = [jax.device_put(X[:12], sharding), jax.device_put(X[12:], sharding)]
    got = recalibrate(model, variables, batches, **call)
    (mean, var), _ = reference(kernels, pooled, False)
    stats = stats_at(got, ("first",))
    np.testing.assert_allclose(stats["mean"], mean, 1e-5, 1e-5)
    np.testing.assert_allclose(stats["var"], var, 1e-5)


def test_several_inputs_and_a_layer_that_is_called_twice():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, y, train=True):
            norm = bn_jax.linen.BatchNorm(use_running_average=not train)
            return norm(x) + norm(y)

    model = Shared()
    variables = model.init(jax.random.key(0), X, X)
    got = recalibrate(model, variables, [(batch, 2 * batch) for batch in BATCHES])
    both = np.concatenate([X, 2 * X]).astype(np.float64)
    stats = stats_at(got, ("BatchNorm_0",))
    np.testing.assert_allclose(stats["mean"], both.mean(0), 1e-5)
    np.testing.assert_allclose(stats["var"], both.var(0), 1e-5)


def test_a_layer_at_the_root():
    layer = bn_jax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    got = recalibrate(graphdef, state, BATCHES)
    np.testing.assert_allclose(got["mean"][...], X.mean(0), 1e-5)
    module = bn_jax.linen.BatchNorm(use_running_average=False)
    got = recalibrate(module, module.init(jax.random.key(0), X), BATCHES)
    np.testing.assert_allclose(got["batch_stats"]["mean"], X.mean(0), 1e-5)


def test_features_that_no_batch_has_seen_keep_their_statistics():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return bn_jax.linen.BatchNorm(use_running_average=False)(x, mask=mask)

    model = Masked()
    mask = jnp.array([[True, False, True]])
    variables = model.init(jax.random.key(0), X, mask)
    got = recalibrate(model, variables, [(batch, mask) for batch in BATCHES])
    stats = got["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"][::2], X.mean(0)[::2], 1e-5)
    assert (stats["mean"][1], stats["var"][1]) == (0, 1)


def test_refusals():
    model, variables, call, _, _ = linen(bn_jax.linen.BatchNorm)
    with pytest.raises(ValueError, match="no batches"):
        recalibrate(model, variables, [], **call)
    with pytest.raises(ValueError, match="pass a list"):
        recalibrate(model, variables, iter(BATCHES), layer_by_layer=True, **call)
    dense = nn.Dense(2)
    with pytest.raises(ValueError, match="no BatchNorm"):
        recalibrate(dense, dense.init(jax.random.key(0), X), BATCHES)


def test_statistics_of_every_step_of_a_scan():
    """One batch: the statistics are those that it is normalised with, of each step its own."""
    from bn_jax.linen import BatchNorm
    from bn_jax.models import LSTM

    model = LSTM(5, 3, norm=BatchNorm, places=("recurrent",))
    x = jax.random.normal(jax.random.key(0), (12, 4, 4, 1))
    variables = model.init(jax.random.key(1), x, train=False)
    found = recalibrate(model, variables, [x], train=True)
    np.testing.assert_allclose(
        model.apply(found, x, train=False),
        model.apply(variables, x, train=True, mutable=["batch_stats"])[0],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    shapes = {v.shape[0] for v in jax.tree.leaves(found["batch_stats"])}
    assert shapes == {4}
