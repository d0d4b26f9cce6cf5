"""Models of other people, as two pure functions: of every kind, against the model itself."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.linen
from bn_jax.errors import UserError
from bn_jax.lab.foreign import found
from bn_jax.lab.models import MLP
from bn_jax.surgery import swap

X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (8, 5)), jnp.float32)
KEY = jax.random.key(7)


class Body(nn.Module):
    """Told that it trains by its caller."""

    num_outputs: int = 3
    axis_name: Any = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_outputs)(x)


def net(argument, inverse=False, **fields):
    """A class whose call takes the mode under a name."""
    source = f"lambda self, x, {argument}: self.body()(x, {argument} != {inverse})"
    call = nn.compact(eval(source))
    call.__name__ = "__call__"
    members = {
        "__annotations__": {"num_outputs": int},
        "num_outputs": 3,
        "body": nn.nowrap(lambda self: Body(self.num_outputs, name="body", **fields)),
        "__call__": call,
    }
    return type("Net", (nn.Module,), members)


class ByField(nn.Module):
    classes: int = 3
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        return Body(self.classes, name="body")(x, not self.deterministic)


class NnxNet(nnx.Module):
    def __init__(self, din: int, dout: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [nnx.Linear(din, 16, rngs=rngs), nnx.Linear(16, dout, rngs=rngs)]
        )
        self.bn, self.dropout = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.bn(self.layers[0](x)))
        return self.layers[1](x)


class NnxTold(NnxNet):
    def __call__(self, x, *, training):
        x = self.bn(self.layers[0](x), use_running_average=not training)
        return self.layers[1](self.dropout(x, deterministic=not training))


def over_axis(module):
    module.bn.axis_name = "batch"
    return module


LINEN = {
    "train": net("train"),
    "deterministic": net("deterministic", inverse=True),
    "field": ByField,
    "instance": net("train")(num_outputs=3),
    "function": lambda n: net("train")(num_outputs=n),
    "function of nothing": lambda: net("is_training")(),
    "axis": net("train", axis_name="batch"),
}
NNX = {
    "class": NnxNet,
    "told": NnxTold,
    "instance": NnxNet(5, 3, rngs=nnx.Rngs(0)),
    "function": lambda n, rngs: over_axis(NnxNet(5, n, rngs=rngs)),
}


@pytest.mark.parametrize("name", [*LINEN, *(f"nnx {n}" for n in NNX)])
def test_in_both_modes_it_does_as_the_model(name):
    source = NNX[name[4:]] if name.startswith("nnx ") else LINEN[name]
    model = found(source, "mine:Net", 3, X)
    keys = jax.random.split(KEY, 2)
    variables = jax.jit(jax.vmap(model.init, (0, None)))(keys, X)

    @functools.partial(jax.jit, static_argnums=1)
    def apply(variables, train, keys):
        return jax.vmap(lambda v, k: model.apply(v, X, train=train, key=k))(variables, keys)

    y, after = apply(variables, True, keys)
    assert y.shape == (2, 8, 3)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, variables)
    # Dropout is other with another key, and the statistics move as the layer's do.
    assert not np.array_equal(y, apply(variables, True, keys[::-1])[0])
    first = jax.tree.map(lambda v: v[0], variables)
    kernel, bias, mean, second, last = _leaves(first)
    h = X @ kernel + bias[None]
    (moved,) = [v for p, v in _flat(after["batch_stats"]) if p[-1] == "mean"]
    np.testing.assert_allclose(moved[0], 0.99 * mean + 0.01 * h.mean(0), atol=1e-5)
    # In evaluation: mean 0 and variance 1, no dropout, nothing moves.
    y, same = apply(variables, False, keys)
    want = h / np.sqrt(1 + 1e-5) @ second + last[None]
    np.testing.assert_allclose(y[0], want, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    assert np.array_equal(y[0], y[1]) is model.same_start is (name == "nnx instance")


def _flat(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(tuple(k.key for k in path), v) for path, v in flat]


def _leaves(variables):
    """Kernel and bias of the first layer, the running mean, kernel and bias of the last."""
    kernels = [v for p, v in _flat(variables["params"]) if p[-1] == "kernel"]
    biases = [v for p, v in _flat(variables["params"]) if p[-1] == "bias"]
    first, last = (i for w in (16, 3) for i, k in enumerate(kernels) if k.shape[-1] == w)
    (mean,) = [v for p, v in _flat(variables["batch_stats"]) if p[-1] == "mean"]
    out = next(b for b in biases if b.shape == (3,))
    return kernels[first], jnp.zeros(16), mean, kernels[last], out


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (LINEN["train"], "mine:Net: Linen; mode: argument train; random numbers: dropout"),
        (ByField, "mine:Net: Linen; mode: field deterministic; random numbers: dropout"),
        (
            nn.Dense(3),
            "mine:Net: Linen; mode: alike in training and evaluation; random numbers: none",
        ),
        (
            LINEN["axis"],
            "mine:Net: Linen; mode: argument train; random numbers: dropout; "
            "axes of one device: batch",
        ),
        (NnxTold, "mine:Net: NNX; mode: argument training; random numbers: default"),
        (
            NNX["instance"],
            "mine:Net: NNX; mode: train() and eval(); random numbers: default; "
            "all seeds start from the same weights",
        ),
    ],
)
def test_it_is_described(source, line):
    assert found(source, "mine:Net", 3, X).describe() == line


@pytest.mark.parametrize(
    "source", [LINEN["train"], ByField, NnxNet], ids=["call", "field", "nnx"]
)
def test_swapped(source):
    """Each example by itself, so that what is beside it makes no difference."""
    model = found(source, "mine:Net", 3, X).swapped("dyt", alpha=0.3)
    variables = model.init(KEY, X)
    whole, after = model.apply(variables, X, train=False)
    jax.tree.map(np.testing.assert_array_equal, after, variables)
    alone, _ = model.apply(variables, X[:1], train=False)
    np.testing.assert_allclose(whole[:1], alone, atol=1e-6)
    alphas = [v for p, v in _flat(variables["params"]) if p[-1] == "alpha"]
    assert np.array_equal(alphas, [np.float32(0.3)])


def test_networks_of_the_laboratory_start_as_they_do():
    mlp = MLP((8,), 3, norm=bn_jax.linen.BatchNorm)
    model = found(mlp, "mlp", 3, X)
    jax.tree.map(
        np.testing.assert_array_equal, model.init(KEY, X), mlp.init(KEY, X, train=False)
    )


def test_swapped_before_it_is_found():
    """A model that is a field, or has hooks, is what its call says."""

    class Wrapper(nn.Module):
        model: nn.Module
        train: bool = False

        @nn.compact
        def __call__(self, x):
            return self.model(x, self.train)

    wrapped = Wrapper(Body(3))
    model = found(swap(wrapped, "layer"), "mine:Net", 3, X)
    assert (model.how, model.modes) == ("field", {"train": True})
    variables = model.init(KEY, X)
    want = swap(wrapped.clone(train=True), "layer")
    y, _ = model.apply(variables, X, train=True, key=KEY)
    rngs = {"dropout": jax.random.fold_in(KEY, 0)}
    np.testing.assert_array_equal(y, want.apply(variables, X, rngs=rngs))


def test_sown_values_and_bare_arrays_of_nnx():
    class Sowing(nnx.Module):
        def __init__(self, dout, rngs):
            self.linear = nnx.Linear(5, dout, rngs=rngs)
            self.offset = nnx.data(jnp.arange(3.0))

        def __call__(self, x):
            x = self.linear(x) + self.offset[None]
            self.seen = nnx.Intermediate(x)
            return x

    model = found(Sowing, "mine:Sowing", 3, X)
    variables = model.init(KEY, X)
    y, after = model.apply(variables, X, train=True)
    jax.tree.map(np.testing.assert_array_equal, after, variables)
    linear = variables["params"]["linear"]
    np.testing.assert_allclose(y, X @ linear["kernel"] + np.arange(3.0)[None], atol=1e-5)


def test_tokens_and_several_outputs():
    class Tokens(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, tokens, *, training=False):
            x = nn.Embed(11, 4)(tokens).mean(1)
            x = nn.BatchNorm(use_running_average=not training)(x)
            return {"classes": nn.Dense(self.num_classes)(x), "features": x}

    tokens = jnp.arange(24).reshape(4, 6) % 11
    model = found(Tokens, "mine:Tokens", 2, tokens)
    outputs, _ = model.apply(model.init(KEY, tokens), tokens, train=True)
    assert (outputs["classes"].shape, outputs["features"].shape) == ((4, 2), (4, 4))


def test_noise_under_a_name_of_its_own():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    assert found(Noisy, "mine:Noisy", 3, X).streams == ("noise", "dropout")


def test_a_model_that_trains_where_its_statistics_are_mutable():
    class Mutable(nn.Module):
        @nn.compact
        def __call__(self, x):
            train = self.is_mutable_collection("batch_stats")
            return nn.BatchNorm(use_running_average=not train)(x)

    model = found(Mutable, "mine:Mutable", 5, X)
    variables = model.init(KEY, X)
    y, _ = model.apply(variables, X, train=True)
    np.testing.assert_allclose(y.mean(0), np.zeros(5), atol=1e-5)
    y, _ = model.apply(variables, X, train=False)
    np.testing.assert_allclose(y, X, atol=1e-4)


class Untold(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


class Needs(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, lengths, train):
        return x


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({"a": 3}, r"^mine:Net is a dict, which is no model: say a class"),
        (lambda n: 3, r"^mine:Net makes a int, which is no model: say a class"),
        (lambda a, b: nn.Dense(a), r"^mine:Net is made with a, b: say a function"),
        (Needs, r"^mine:Net is made with width: say a function"),
        (Needs(3), r"^mine:Net: its call wants lengths beside x: give a default$"),
        (Untold, r"^mine:Net has running statistics and cannot be told .* train, training, "),
        (
            nn.Sequential([nn.Dense(3), nn.Dropout(0.5, deterministic=False)]),
            r"^mine:Net has random numbers \(dropout\) and cannot be told",
        ),
        (functools.partial(nn.Dense, "wide"), r"^mine:Net: \w+Error: "),
    ],
    ids=["dict", "int", "two", "class", "call", "untold", "random", "own error"],
)
def test_what_cannot_be_trained_is_refused(source, match):
    with pytest.raises(UserError, match=match) as refused:
        found(source, "mine:Net", 3, X)
    assert len(str(refused.value).splitlines()) == 1
