import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import bn_jax.linen
import bn_jax.nnx
from bn_jax import cumulative_mean, ema
from bn_jax.surgery import versions
from bn_jax.surgery.versions import migrate, stamp

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(8, 3)))


class Net(nn.Module):
    norm: type = bn_jax.linen.BatchNorm
    estimator: object = None
    features: int = 5

    @nn.compact
    def __call__(self, x):
        fields = {"estimator": self.estimator} if self.estimator else {}
        norm = self.norm(use_running_average=False, name="first", **fields)
        return self.norm(use_running_average=False, **fields)(norm(nn.Dense(self.features)(x)))


class OfNNX(nnx.Module):
    def __init__(self, norm, rngs, **fields):
        self.body = nnx.List([nnx.Linear(3, 5, rngs=rngs), norm(5, rngs=rngs, **fields)])
        self.tail = norm(5, rngs=rngs, **fields)

    def __call__(self, x):
        return self.tail(self.body[1](self.body[0](x)))


def linen(own=True, **fields):
    """A model and its variables after three steps."""
    model = Net(bn_jax.linen.BatchNorm if own else nn.BatchNorm, **fields)
    variables = model.init(jax.random.key(0), X)
    for _ in range(3):
        variables = variables | model.apply(variables, X, mutable=["batch_stats"])[1]
    return model, variables


def of_nnx(own=True, **fields):
    module = OfNNX(bn_jax.nnx.BatchNorm if own else nnx.BatchNorm, nnx.Rngs(0), **fields)
    for _ in range(3):
        module(X)
    return nnx.split(module)


each_home = pytest.mark.parametrize("home", [linen, of_nnx])


def changed(variables, change):
    """With {path: statistic} as `change` returns it."""
    if isinstance(variables, nnx.State):
        flat = dict(nnx.to_flat_state(variables))
        stats = {p: v[...] for p, v in flat.items() if type(v) is nnx.BatchStat}
        kept = {p: v for p, v in flat.items() if p not in stats}
        new = {p: nnx.BatchStat(v) for p, v in change(stats).items()}
        return nnx.from_flat_state(kept | new)
    stats = change(traverse_util.flatten_dict(variables["batch_stats"]))
    return {**variables, "batch_stats": traverse_util.unflatten_dict(stats)}


def at(variables, path, name):
    place = variables if isinstance(variables, nnx.State) else variables["batch_stats"]
    for part in path:
        place = place[part]
    return np.asarray(place[name])


def first_layer(variables):
    return ("body", 1) if isinstance(variables, nnx.State) else ("first",)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def renamed(names):
    return lambda stats: {(*p[:-1], names.get(p[-1], p[-1])): v for p, v in stats.items()}


@each_home
def test_a_stamp_leaves_the_tree_of_batch_stats(home):
    model, variables = home()
    stamped = stamp(variables)
    same(migrate(stamped, variables), variables)
    same(migrate(variables, variables), variables)
    if home is linen:
        same(stamped["batch_stats"], variables["batch_stats"])
        _, new = model.apply(stamped, X, mutable=["batch_stats"])
        assert new.keys() == {"batch_stats"}


@each_home
def test_a_later_version(home, monkeypatch):
    _, variables = home()
    monkeypatch.setattr(versions, "VERSION", 7)
    stamped = stamp(variables)
    migrate(stamped, variables)
    monkeypatch.setattr(versions, "VERSION", 3)
    with pytest.raises(ValueError, match=r"version 7, and this bn_jax knows 3"):
        migrate(stamped, variables)


@each_home
@pytest.mark.parametrize(
    "names",
    [
        {"mean": "running_mean", "var": "running_var", "count": "num_batches_tracked"},
        {"mean": "moving_mean", "var": "moving_variance"},
        {"mean": "ra_mean", "var": "ra_var"},
    ],
)
def test_foreign_names(home, names):
    _, variables = home(estimator=cumulative_mean)
    same(migrate(changed(variables, renamed(names)), variables), variables)


@each_home
def test_of_flaxs_layers_where_a_count_is_wanted(home):
    _, variables = home(own=False)
    model, template = home(estimator=cumulative_mean)
    first = first_layer(template)
    spelled = "/".join(map(str, first))
    with pytest.raises(ValueError, match=rf"{spelled}/count.* missing: give count="):
        migrate(variables, template)
    got = migrate(variables, template, count=3)
    np.testing.assert_array_equal(at(got, first, "count"), np.full(5, 3))
    np.testing.assert_array_equal(at(got, first, "mean"), at(variables, first, "mean"))
    if home is linen:
        assert np.isfinite(model.apply(got, X, mutable=["batch_stats"])[0]).all()
    else:
        assert np.isfinite(nnx.merge(model, got, copy=True)(X)).all()
    same(migrate(got, variables), variables)


@each_home
def test_one_count_or_one_for_each_feature(home):
    _, template = home(estimator=cumulative_mean)

    def single(stats):
        return {p: v[0] if p[-1] == "count" else v for p, v in stats.items()}

    one = changed(template, single)
    same(migrate(one, template), template)
    same(migrate(template, one), one)

    def differing(stats):
        return {p: jnp.arange(5) if p[-1] == "count" else v for p, v in stats.items()}

    with pytest.raises(ValueError, match=r"count differs between features.*0 to 4"):
        migrate(changed(template, differing), one)


@each_home
def test_dtypes_are_the_templates(home):
    _, variables = home()
    half = changed(variables, lambda s: {p: v.astype(jnp.bfloat16) for p, v in s.items()})
    got = migrate(half, variables)
    first = first_layer(variables)
    assert at(got, first, "var").dtype == np.float32
    np.testing.assert_allclose(at(got, first, "var"), at(variables, first, "var"), 1e-2)


def with_leaf(name, value):
    """A change of the leaves of that name in the first layer."""

    def change(stats):
        path = min(stats, key=str)[:-1]
        path = ("first",) if ("first", "mean") in stats else path
        return stats | {(*path, name): value(stats.get((*path, name)))}

    return change


def without(predicate):
    return lambda stats: {p: v for p, v in stats.items() if not predicate(p)}


REFUSED = {
    "layer missing": (without(lambda p: p[0] in ("first", "body")), "(first|body/1): missing"),
    "leaf missing": (without(lambda p: p[-1] == "var"), "var: missing"),
    "extra layer": (
        lambda s: s | {("more", "mean"): jnp.zeros(2), ("more", "var"): jnp.ones(2)},
        "more: of no layer of the template",
    ),
    "extra leaf": (with_leaf("skew", lambda v: jnp.ones(5)), "skew: not a statistic"),
    "twice": (with_leaf("running_mean", lambda v: jnp.ones(5)), "a second mean"),
    "shape": (with_leaf("mean", lambda v: v[:1]), r"mean has shape \(1,\), and \(5,\)"),
    "integer": (with_leaf("mean", lambda v: v.astype(int)), "mean is of int32, and float32"),
    "complex": (with_leaf("mean", lambda v: v + 0j), "mean is of complex64"),
    "float count": (with_leaf("count", lambda v: v + 0.5), "count is of float32, and int32"),
    "count shape": (with_leaf("count", lambda v: v[:2]), r"count has shape \(2,\)"),
    "nan": (with_leaf("mean", lambda v: v.at[2].set(jnp.nan)), "mean is not finite"),
    "inf": (with_leaf("var", lambda v: v.at[2].set(jnp.inf)), "var is not finite"),
    "negative var": (with_leaf("var", lambda v: v.at[2].set(-1)), r"var is negative \(-1.0\)"),
    "negative count": (with_leaf("count", lambda v: v - 9), r"count is negative \(-6\)"),
}


@each_home
@pytest.mark.parametrize(("change", "match"), REFUSED.values(), ids=REFUSED)
def test_refusals(home, change, match):
    _, variables = home(estimator=cumulative_mean)
    before = jax.tree.map(np.array, variables)
    with pytest.raises(ValueError, match=match):
        migrate(changed(variables, change), variables)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_kinds_of_variables():
    with pytest.raises(TypeError, match="from_flax"):
        migrate(linen()[1], of_nnx()[1])


def test_without_batch_norms():
    variables = nn.Dense(2).init(jax.random.key(0), X)
    same(migrate(stamp(variables), variables), variables)
    _, other = linen(estimator=ema)
    with pytest.raises(ValueError, match=r"BatchNorm_0, first: missing"):
        migrate(variables, other)
