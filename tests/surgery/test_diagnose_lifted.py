"""Layers within transformations, of classes of the project's own, and with shared Variables."""

import functools

import flax.linen as nn
import jax
import pytest
from diagnose_subjects import X, kinds
from flax import nnx
from foreign_norms import NORMS

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import diagnose, recalibrate


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = bn_jax.linen.BatchNorm(use_running_average=not train)
        return nn.relu(norm(nn.Dense(6, use_bias=False)(x)))


LIFTED = {
    "plain": Block,
    "remat": nn.remat(Block, static_argnums=(2,)),
    "jit": nn.jit(Block, static_argnums=(2,)),
}


def chain(block):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return block(name="b")(block(name="a")(x, train), train)

    return Net()


@pytest.mark.parametrize("shift", [0, 100])
def test_findings_are_those_of_the_plain_model(shift):
    """Of statistics that are right for X, on other inputs."""
    plain = chain(Block)
    variables = plain.init(jax.random.key(0), X, False)
    variables = recalibrate(plain, variables, [X], train=True)
    found = {name: diagnose(chain(b), variables, X + shift) for name, b in LIFTED.items()}
    assert kinds(found["remat"]) == kinds(found["jit"]) == kinds(found["plain"])
    assert bool(found["plain"]) == bool(shift)


def repeated(lift, told):
    axes = {"params": 0, "batch_stats": 0} | ({"bn_jax.surgery": 0} if told else {})
    split = {"variable_axes": axes, "split_rngs": {"params": True}}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            if lift == "scan":

                class Body(nn.Module):
                    @nn.compact
                    def __call__(self, x, _):
                        return Block(name="block")(x, train), None

                x = nn.scan(Body, length=2, **split)(name="two")(x, None)[0]
            else:
                two = nn.vmap(Block, in_axes=(None, None), axis_size=2, **split)
                x = two(name="two")(x, train).mean(0)
            return Block(name="last")(x, train)

    return Net()


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_repeated_layers(lift):
    model = repeated(lift, told=True)
    variables = model.init(jax.random.key(0), X, False)
    found = diagnose(model, variables, X)
    path = ("two", "block", "BatchNorm_0") if lift == "scan" else ("two", "BatchNorm_0")
    assert kinds(found) == {("never_updated", p) for p in (path, ("last", "BatchNorm_0"))}
    with pytest.raises(ValueError, match=r"say variable_axes=\{'bn_jax.surgery': 0\}"):
        diagnose(repeated(lift, told=False), variables, X)
    stats = variables["batch_stats"]["two"]
    stats = stats["block"] if lift == "scan" else stats
    stats["BatchNorm_0"]["var"] = stats["BatchNorm_0"]["var"].at[1, 3].set(-1)
    assert ("negative_variance", path) in kinds(diagnose(model, variables, X))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        self.norm = bn_jax.nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


class Called(nnx.Module):
    def __init__(self, around):
        self.around, rngs = around, nnx.Rngs(0)
        self.a, self.b = NnxBlock(rngs), NnxBlock(rngs)

    def __call__(self, x):
        return self.b(self.around(lambda block, x: block(x))(self.a, x))


@pytest.mark.parametrize("around", [nnx.remat, nnx.jit])
def test_layers_of_nnx(around):
    found = diagnose(*nnx.split(Called(around)), X)
    assert kinds(found) == {("never_updated", (name, "norm")) for name in "ab"}


def test_what_nothing_comes_out_of():
    within = lambda call: lambda block, x: jax.jit(functools.partial(call, block))(x)  # noqa: E731
    with pytest.raises(ValueError, match="call the model without it"):
        diagnose(*nnx.split(Called(within)), X)


def test_layers_that_share_their_statistics():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = NnxBlock(rngs), NnxBlock(rngs)
            self.b.norm.mean, self.b.norm.var = self.a.norm.mean, self.a.norm.var

        def __call__(self, x):
            return self.b(self.a(x))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    found = kinds(diagnose(graphdef, state, X))
    assert {("never_updated", ("a", "norm")), ("never_updated", ("b", "norm"))} <= found


@pytest.mark.parametrize("case", NORMS)
def test_a_batch_norm_of_ones_own(case):
    """Named, or examined as it is said to be read."""
    build, adapters = NORMS[case]
    model, variables, train = build()
    x = 5 + 3 * jax.random.normal(jax.random.key(1), (64, 3))
    calls = {"train": train, "evaluate": {k: not v for k, v in train.items()}}
    examine = functools.partial(diagnose, model, batch_norms=adapters, **calls)
    (unknown,) = [
        f for f in diagnose(model, variables, x, **calls) if f.kind == "unknown_layer"
    ]
    (cls,) = adapters
    assert unknown.path == ("norm",)
    assert f"batch_norms={{{cls.__name__}: Adapter" in unknown.remedy
    well = recalibrate(model, variables, [x], batch_norms=adapters, **train)
    if isinstance(model, nn.Module):
        assert examine(well, x) == []
        assert "stale" in {f.kind for f in examine(well, 9 * x)}
