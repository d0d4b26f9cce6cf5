import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bn_jax.linen
import bn_jax.nnx
from bn_jax.core.population import algorithm_2, pooled
from bn_jax.surgery import fold, recalibrate, reset

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
@pytest.mark.parametrize(
    ("population", "layer_by_layer"), [(pooled, False), (pooled, True), (algorithm_2, True)]
)
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
    got = recalibrate(model, variables, [(batch, 2 * batch, True) for batch in BATCHES])
    both = np.concatenate([X, 2 * X]).astype(np.float64)
    stats = stats_at(got, ("BatchNorm_0",))
    np.testing.assert_allclose(stats["mean"], both.mean(0), 1e-5)
    np.testing.assert_allclose(stats["var"], both.var(0), 1e-5)


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
    norm, rows = nn.BatchNorm(use_running_average=False), [X[i : i + 1] for i in range(4)]
    variables = norm.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="no variance, as no batch has two elements"):
        recalibrate(norm, variables, rows, population=algorithm_2)
    got = recalibrate(norm, variables, rows)["batch_stats"]
    np.testing.assert_allclose(got["var"], np.float64(X[:4]).var(0), 1e-5)


class LinenDropout(nn.Module):
    def setup(self):
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm()

    def __call__(self, x, train):
        return self.norm(self.dropped(x, train), use_running_average=not train)

    def dropped(self, x, train=True):
        return self.drop(x, deterministic=not train)


class NnxDropout(nnx.Module):
    def __init__(self, rngs):
        self.drop, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.drop(x))


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("home", ["linen", "nnx"])
def test_every_batch_has_its_own_random_numbers(home, layer_by_layer):
    """The reference is the same dropout, batch by batch, and float64 moments of all."""
    batches, key = [X[:8], X[8:16], X[16:]], jax.random.key(3)
    if home == "linen":
        model = LinenDropout()
        variables = model.init(key, X, train=False)
        call = {"train": True, "rngs": {"dropout": key}}
        keys = [{"dropout": jax.random.fold_in(key, i)} for i in range(3)]
        seen = [
            model.apply(variables, x, rngs=k, method="dropped")
            for x, k in zip(batches, keys, strict=True)
        ]
    else:
        module = NnxDropout(nnx.Rngs(3))
        (model, variables), call = nnx.split(module), {}
        drop = nnx.clone(module).drop
        seen = [drop(x) for x in batches]
    got = recalibrate(model, variables, batches, layer_by_layer=layer_by_layer, **call)
    stats = stats_at(got, ("norm",))
    every = np.concatenate(seen).astype(np.float64)
    np.testing.assert_allclose(stats["mean"], every.mean(0), 1e-5)
    np.testing.assert_allclose(stats["var"], every.var(0), 1e-5)
    assert jax.tree.structure(got) == jax.tree.structure(variables)
    if home == "nnx":  # its streams are where they were
        count = got["drop"]["rngs"]["count"]
        assert count[...] == variables["drop"]["rngs"]["count"][...]


def test_compiled_once_for_a_shape():
    """Whatever the number of the batch, and with streams that go on."""
    traces = []

    class Traced(NnxDropout):
        def __call__(self, x):
            traces.append(x.shape)
            return super().__call__(x)

    model, variables = nnx.split(Traced(nnx.Rngs(0)))
    recalibrate(model, variables, [X[:8], X[8:16], X[16:], X[:4]])
    assert sorted(traces) == [(4, 3), (8, 3), (8, 3)]  # one is to find the layers


@each_subject
def test_a_model_in_evaluation_is_refused(build, norm):
    model, variables, call, _, paths = build(norm)
    if call:
        call = {"train": False}
    else:
        module = nnx.merge(model, variables)
        module.eval()
        model = nnx.graphdef(module)
    names = ", ".join("/".join(map(str, path)) for path in paths)
    with pytest.raises(ValueError, match=f"in evaluation, {names}: call the model in training"):
        recalibrate(model, variables, BATCHES, **call)


class PartlyFrozen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=True, name="fixed")(x)
        x = nn.BatchNorm(use_running_average=not train, name="a")(x)
        return nn.BatchNorm(use_running_average=not train, name="b")(x)


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_only_some_layers(layer_by_layer):
    model = PartlyFrozen()
    variables = model.init(jax.random.key(0), X, train=False)
    fixed = {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 4.0)}
    variables["batch_stats"]["fixed"] = fixed
    call = {"layer_by_layer": layer_by_layer, "train": True}
    whole = recalibrate(model, variables, BATCHES, **call)
    first = recalibrate(model, variables, BATCHES, only="a", **call)
    assert_equal = np.testing.assert_array_equal
    jax.tree.map(assert_equal, first["batch_stats"]["a"], whole["batch_stats"]["a"])
    jax.tree.map(assert_equal, first["batch_stats"]["b"], variables["batch_stats"]["b"])
    jax.tree.map(assert_equal, whole["batch_stats"]["fixed"], fixed)
    mean = stats_at(whole, ("a",))["mean"]
    np.testing.assert_allclose(mean, (X.mean(0) - 2) / np.sqrt(4 + 1e-5), 1e-4)
    with pytest.raises(ValueError, match="no BatchNorm fits 'c': there are fixed, a, b"):
        recalibrate(model, variables, BATCHES, only=["a", "c"], **call)
    with pytest.raises(ValueError, match="in evaluation, fixed: call"):
        recalibrate(model, variables, BATCHES, only=["fixed", "a"], train=True)


@pytest.mark.parametrize(("build", "norm"), [SUBJECTS["linen"], SUBJECTS["flax nnx"]])
@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_moments_that_are_not_finite_are_named(build, norm, value):
    model, variables, call, kernels, paths = build(norm)
    poisoned = [x.copy() for x in BATCHES]
    poisoned[1][4, 2] = value
    first = "/".join(map(str, paths[0]))
    with pytest.raises(ValueError, match=rf"batches\[1\]: what {first} is given"):
        recalibrate(model, variables, poisoned, **call)
    got = recalibrate(model, variables, poisoned, skip_nonfinite=True, **call)
    left = np.concatenate([BATCHES[0], BATCHES[2]]).astype(np.float64) @ np.float64(kernels[0])
    stats = stats_at(got, paths[0])
    np.testing.assert_allclose(stats["mean"], left.mean(0), 1e-5, 1e-5)
    np.testing.assert_allclose(stats["var"], left.var(0), 1e-5)
    with pytest.raises(ValueError, match="it is so of every batch"):
        recalibrate(model, variables, poisoned[1:2], skip_nonfinite=True, **call)


class NamesAxes(nn.Module):
    """Collectives in the layers, and one of the model's own, before them."""

    axis_name: str = "replicas"
    groups: tuple = None
    own: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        if self.own:
            x = x + jax.lax.pmean(jnp.mean(x), self.axis_name)
        return nn.BatchNorm(
            use_running_average=not train, axis_name=self.axis_name,
            axis_index_groups=self.groups,
        )(x)  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"groups": ((0, 1), (2, 3))}, {"own": True}])
def test_an_axis_that_nobody_has_bound(fields):
    model = NamesAxes(**fields)
    variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), X)
    variables = {name: {"BatchNorm_0": v} for name, v in variables.items()}
    got = recalibrate(model, variables, BATCHES)
    shift = [x.mean() if "own" in fields else 0 for x in BATCHES]
    seen = np.concatenate([np.float64(x) + s for x, s in zip(BATCHES, shift, strict=True)])
    stats = stats_at(got, ("BatchNorm_0",))
    np.testing.assert_allclose(stats["mean"], seen.mean(0), 1e-5)
    np.testing.assert_allclose(stats["var"], seen.var(0), 1e-5)


def test_an_axis_that_no_module_names():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(jax.lax.psum(x, "elsewhere"))

    variables = {"batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}
    with pytest.raises(NameError, match="elsewhere"):
        recalibrate(Other(), variables, BATCHES)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(3)(x))
        return nn.relu(x)


class Lifted(nn.Module):
    around: object = None

    @nn.compact
    def __call__(self, x, train=True):
        block = self.around(Block) if self.around else Block
        return block(name="a")(block(name="b")(x, train), train)


LIFTED = {
    "remat": functools.partial(nn.remat, static_argnums=2),
    "jit": functools.partial(nn.jit, static_argnums=2),
    "both": lambda b: nn.remat(nn.jit(b, static_argnums=2), static_argnums=2),
}


@pytest.mark.parametrize(
    ("around", "layer_by_layer"), [*zip(LIFTED.values(), (True, False, True), strict=True)]
)
def test_within_remat_and_jit(around, layer_by_layer):
    variables = Lifted().init(jax.random.key(0), X, False)
    call = {"layer_by_layer": layer_by_layer}
    want = recalibrate(Lifted(), variables, BATCHES, **call)
    got = recalibrate(Lifted(around), variables, BATCHES, **call)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, want)


def vmapped(told):
    """Two copies of a block beside each other."""
    axes = {"params": 0, "batch_stats": 0} | ({"bn_jax.surgery": 0} if told else {})
    return nn.vmap(Beside, variable_axes=axes, split_rngs={"params": True}, in_axes=0)


class Beside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, name="norm")(x)


def test_within_vmap():
    model = vmapped(told=True)()
    batches = [np.stack([x, 3 * x + 1]) for x in BATCHES]
    variables = model.init(jax.random.key(0), batches[0])
    got = recalibrate(model, variables, batches)
    stats = stats_at(got, ("norm",))
    for i, x in enumerate([np.float64(X), 3 * np.float64(X) + 1]):
        np.testing.assert_allclose(stats["mean"][i], x.mean(0), 1e-5)
        np.testing.assert_allclose(stats["var"][i], x.var(0), 1e-5)
    with pytest.raises(ValueError, match=r"variable_axes=\{'bn_jax.surgery': 0\}"):
        recalibrate(vmapped(told=False)(), variables, batches)


class SharedByAScan(nn.Module):
    """The same statistics at every step: those of all steps together."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            Recurrent, variable_broadcast="params", variable_carry="batch_stats",
            variable_axes={"bn_jax.surgery": 0}, split_rngs={"params": False}, length=3,
        )  # fmt: skip
        return scanned()(x, None)[0]


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return 2 * nn.BatchNorm(use_running_average=False, name="norm")(x) + 1, None


def test_statistics_that_all_steps_of_a_scan_have():
    model = SharedByAScan()
    inner = Recurrent().init(jax.random.key(0), X, None)
    variables = {name: {"ScanRecurrent_0": v} for name, v in inner.items()}
    got = recalibrate(model, variables, [X])
    x = seen = np.float64(X)
    for _ in range(2):
        x = 2 * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + 1
        seen = np.concatenate([seen, x])
    (mean,) = (v["norm"]["mean"] for v in got["batch_stats"].values())
    np.testing.assert_allclose(mean, seen.mean(0), 1e-5)


class Awkward(nn.Module):
    """Outputs and variables as other people have them."""

    @nn.compact
    def __call__(self, inputs, *, train):
        self.variable("streams", "key", lambda: jax.random.key(1))
        init = nn.with_partitioning(nn.initializers.ones, ("features",))
        norm = bn_jax.linen.BatchNorm(use_running_average=not train, scale_init=init)
        body = nn.Sequential([nn.Dense(3), norm, nn.relu])
        return {"y": body(inputs["x"]), "others": (None, inputs["y"])}


def test_awkward_models():
    model = Awkward()
    batches = [{"x": x, "y": x} for x in BATCHES]
    variables = model.init(jax.random.key(0), batches[0], train=False)
    variables = freeze(variables)
    got = recalibrate(model, variables, batches, train=True)
    assert jax.tree.structure(got) == jax.tree.structure(variables)
    (kernel,) = (v["kernel"] for v in variables["params"].values() if "kernel" in v)
    seen = np.float64(X) @ np.float64(kernel)
    (stats,) = got["batch_stats"].values()
    np.testing.assert_allclose(stats["mean"], seen.mean(0), 1e-5, 1e-6)


class Foldable(nn.Module):
    """The first BatchNorm can be folded, the second follows an activation."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="first")(nn.Dense(4)(x))
        return nn.BatchNorm(use_running_average=not train, name="second")(nn.relu(x))


def test_what_is_left_of_a_folded_model():
    """It sees what running statistics made of the data, which are in the kernel now."""
    model = Foldable()
    variables = model.init(jax.random.key(0), X, train=False)
    folded = fold(model, variables, X, train=False)
    assert [pair.norm for pair in folded.pairs] == [("first",)]
    kernel = np.float64(variables["params"]["Dense_0"]["kernel"])
    got = recalibrate(folded.model, folded.variables, BATCHES, train=True)
    got = stats_at(got, ("second",))
    seen = np.maximum(np.float64(X) @ kernel / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(got["mean"], seen.mean(0), 1e-5)
    np.testing.assert_allclose(got["var"], seen.var(0), 1e-5)
