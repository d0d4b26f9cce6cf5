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


RUNS = []


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        RUNS.append(train)
        for _ in range(50):
            y = bn_jax.linen.BatchNorm(use_running_average=not train)(nn.Dense(6, False)(x))
            x = x + 0.3 * nn.relu(y)
        return nn.Dense(2)(x)


def test_many_layers():
    model, path = Deep(), ("BatchNorm_37",)
    variables = recalibrate(
        model, model.init(jax.random.key(0), X, train=False), [X], train=True
    )
    stats = variables["batch_stats"][path[0]]
    stats["mean"] = stats["mean"] - 100
    RUNS.clear()
    found = diagnose(model, variables, X)
    assert len(RUNS) <= math.log2(50) + 6
    assert [(f.kind, f.path) for f in found] == [
        ("train_evaluation_gap", path),
        ("stale", path),
    ]


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
    # The mode in front of the mask is replaced where it stands.
    place = (True,) if build[0] is LinenNet else ()
    assert subject.diagnose((padded, *place, mask)) == []
    assert "stale" in {f.kind for f in subject.diagnose(padded)}
    few = mask & (jnp.arange(80)[:, None] < 9)
    found = subject.diagnose((padded, *place, few))
    assert {(f.kind, f.figure) for f in found} == {("too_few_elements", 9)}
    if place:  # ours, which takes weights
        found = subject.diagnose((padded, True, jnp.where(mask, 1.0, -1.0)))
        assert {f.kind for f in found} == {"nonfinite"}


@each_subject
def test_a_frozen_layer_is_not_stale(build):
    """It does in training what it does in evaluation."""
    ill = healthy(build, always=True)
    assert kinds(ill.scaled_stats(NORMS[1], 4).diagnose()) == set()
    assert kinds(fresh(build, always=True).diagnose()) == {("never_updated", p) for p in NORMS}


@pytest.mark.parametrize("spelling", ["training", "is_training", "deterministic"])
def test_other_words_for_the_mode(spelling):
    net, norm = SUBJECTS["linen"]
    train = "not deterministic" if spelling == "deterministic" else spelling
    made = {}
    code = f"lambda self, x, {spelling}: net(norm, parent=self, name='net')(x, {train})"
    made["__call__"] = nn.compact(eval(code, {"net": net, "norm": norm}))
    model = type("Renamed", (nn.Module,), made)()
    variables = {name: {"net": v} for name, v in healthy(SUBJECTS["linen"]).variables.items()}
    assert diagnose(model, variables, X) == []


class OwnCollective(nn.Module):
    """Its axis is the layer's and its own, and nobody has bound it."""

    axis_name: str = "batch"

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        return x - jax.lax.pmean(x.mean(0), self.axis_name)[None]


def test_an_axis_that_nobody_has_bound():
    model, start = OwnCollective(), {"mean": jnp.zeros(6), "var": jnp.ones(6)}
    params = {"scale": jnp.ones(6), "bias": jnp.zeros(6)}
    variables = {c: {"BatchNorm_0": v} for c, v in (("params", params), ("batch_stats", start))}
    assert kinds(diagnose(model, variables, X)) == {("never_updated", ("BatchNorm_0",))}
    assert diagnose(model, recalibrate(model, variables, [X], train=True), X) == []


class ByMutability(nn.Module):
    """It trains wherever its statistics are mutable, and takes no word for the mode."""

    @nn.compact
    def __call__(self, x):
        train = self.is_mutable_collection("batch_stats") and not self.is_initializing()
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8, use_bias=False)(x))
        return nn.Dense(2)(nn.relu(x))


def test_a_model_that_trains_wherever_statistics_are_mutable():
    model = ByMutability()
    variables = model.init(jax.random.key(0), X)
    assert kinds(diagnose(model, variables, X)) == {("never_updated", ("BatchNorm_0",))}
    well = recalibrate(model, variables, [X])
    assert diagnose(model, well, X) == []
    assert {f.kind for f in diagnose(model, well, 3 * X)} == {"stale", "train_evaluation_gap"}
