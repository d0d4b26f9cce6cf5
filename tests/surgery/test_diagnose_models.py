"""Models of other kinds: without BatchNorm, deep, shared, masked, in half precision."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from diagnose_subjects import (
    NORMS,
    SUBJECTS,
    LinenNet,
    X,
    each_subject,
    fresh,
    healthy,
    kinds,
)
from flax import nnx

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import recalibrate
from bn_jax.surgery.diagnose import diagnose


def test_no_batch_norm():
    model = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
    variables = model.init(jax.random.key(0), X)
    assert diagnose(model, variables, X) == []
    assert diagnose(*nnx.split(nnx.Linear(6, 3, rngs=nnx.Rngs(0))), X) == []
    variables["params"]["layers_2"]["bias"] = jnp.array([0, jnp.inf])
    assert kinds(diagnose(model, variables, X)) == {("nonfinite", ("layers_2",))}


def test_a_layer_at_the_root():
    layer = bn_jax.nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    assert kinds(diagnose(*nnx.split(layer), X)) == {("never_updated", ())}
    module = bn_jax.linen.BatchNorm()
    variables = module.init(jax.random.key(0), X, use_running_average=False)
    assert kinds(diagnose(module, variables, X)) == {("never_updated", ())}


RUNS = []


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        RUNS.append(train)
        for _ in range(50):
            y = bn_jax.linen.BatchNorm(use_running_average=not train)(nn.Dense(6, False)(x))
            x = x + 0.3 * nn.relu(y)
        return nn.Dense(2)(x)


class DeepNnx(nnx.Module):
    def __init__(self, rngs):
        dense = [nnx.Linear(6, 6, use_bias=False, rngs=rngs) for _ in range(10)]
        self.dense = nnx.List(dense)
        self.norms = nnx.List([bn_jax.nnx.BatchNorm(6, rngs=rngs) for _ in range(10)])
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        RUNS.append(None)
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = x + 0.3 * nnx.relu(norm(dense(x)))
        return self.head(x)


@pytest.mark.parametrize("linen", [True, False])
def test_many_layers(linen):
    """50, and 10 in NNX."""
    ill = 37 if linen else 7
    if linen:
        model, path = Deep(), lambda i: (f"BatchNorm_{i}",)
        variables = model.init(jax.random.key(0), X, train=False)
    else:
        path = lambda i: ("norms", i)  # noqa: E731
        model, variables = nnx.split(DeepNnx(nnx.Rngs(0)))
    well = recalibrate(model, variables, [X], **({"train": True} if linen else {}))

    def worse(at, v):
        names = [getattr(p, "key", None) for p in at]
        mine = all(part in names for part in (*path(ill), "mean"))
        return v - 100 if mine else v

    RUNS.clear()
    found = diagnose(model, jax.tree_util.tree_map_with_path(worse, well), X)
    assert len(RUNS) <= math.log2(50) + 6
    assert [(f.kind, f.path) for f in found] == [
        ("train_evaluation_gap", path(ill)), ("stale", path(ill)),
    ]  # fmt: skip


def test_sampling_alone_is_no_gap():
    """Population statistics, and batches that are as small as they may be."""
    subject = fresh(SUBJECTS["linen"])
    population = 2 * jax.random.normal(jax.random.key(7), (4096, 6)) + 1
    well = recalibrate(subject.model, subject.variables, [population], train=True)
    for i in range(4):
        assert diagnose(subject.model, well, population[16 * i :][:16]) == []


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = bn_jax.linen.BatchNorm(use_running_average=not train)
        return jnp.concatenate([norm(x), norm(3 * x + 20)], -1)


def test_a_layer_of_two_inputs():
    """Its statistics are right for both together, and for neither."""
    model = Shared()
    variables = model.init(jax.random.key(0), X, train=False)
    variables = recalibrate(model, variables, [X], train=True)
    assert kinds(diagnose(model, variables, X)) == {("train_evaluation_gap", ("BatchNorm_0",))}


@each_subject
def test_bfloat16(build):
    subject = healthy(build, dtype=jnp.bfloat16)
    assert subject.diagnose() == []
    ill = subject.scaled_stats(NORMS[0], 4)
    assert kinds(ill.diagnose()) == {
        ("train_evaluation_gap", NORMS[0]), ("stale", NORMS[0]),
    }  # fmt: skip


@each_subject
def test_a_mask_hides_padding(build):
    """The padding is what would make the statistics stale."""
    mask = jnp.arange(80)[:, None] < 64
    padded = jnp.concatenate([X, jnp.full((16, 6), 1e3)])
    subject = healthy(build)
    assert subject.diagnose((padded, mask) if build[0] is not LinenNet else padded,
                            **masked(build, mask)) == []  # fmt: skip
    assert "stale" in {f.kind for f in subject.diagnose(padded)}
    few = mask & (jnp.arange(80)[:, None] < 9)
    found = subject.diagnose((padded, few) if build[0] is not LinenNet else padded,
                             **masked(build, few))  # fmt: skip
    assert {(f.kind, f.figure) for f in found} == {("too_few_elements", 9)}


def masked(build, mask):
    if build[0] is not LinenNet:
        return {}
    return {"train": {"mask": mask}, "evaluate": {"mask": mask}}


def test_within_a_transformation():
    class Remat(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = nn.remat(bn_jax.linen.BatchNorm, static_argnums=(2,))
            return norm(name="norm")(x, not train)

    model = Remat()
    variables = model.init(jax.random.key(0), X, False)
    with pytest.raises(ValueError, match="within a transformation"):
        diagnose(model, variables, X)


@each_subject
def test_a_frozen_layer_is_not_stale(build):
    """It does in training what it does in evaluation."""
    ill = healthy(build, always=True)
    assert kinds(ill.scaled_stats(NORMS[1], 4).diagnose()) == set()
    assert kinds(fresh(build, always=True).diagnose()) == {("never_updated", p) for p in NORMS}


@pytest.mark.parametrize("spelling", ["training", "is_training", "deterministic"])
def test_other_words_for_the_mode(spelling):
    inner = SUBJECTS["linen"][0](SUBJECTS["linen"][1])

    class Renamed(nn.Module):
        if spelling == "training":

            @nn.compact
            def __call__(self, x, training):
                return inner.copy(name="net")(x, training)

        elif spelling == "is_training":

            @nn.compact
            def __call__(self, x, is_training):
                return inner.copy(name="net")(x, is_training)

        else:

            @nn.compact
            def __call__(self, x, deterministic):
                return inner.copy(name="net")(x, not deterministic)

    of_inner = healthy(SUBJECTS["linen"]).variables
    variables = {name: {"net": v} for name, v in of_inner.items()}
    assert diagnose(Renamed(), variables, X) == []
