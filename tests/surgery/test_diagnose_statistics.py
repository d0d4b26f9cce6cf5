"""Findings about statistics: each by a model that is ill in just that way, none by another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnose_subjects import (
    NORMS,
    SUBJECTS,
    LinenNet,
    NnxNet,
    X,
    each_subject,
    fresh,
    healthy,
    kinds,
)

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery.diagnose import diagnose


@each_subject
def test_healthy(build):
    assert healthy(build).diagnose() == []
    assert healthy(build).diagnose(X, X[::-1]) == []


@each_subject
def test_fresh(build):
    found = fresh(build).diagnose()
    assert [(f.kind, f.path) for f in found] == [("never_updated", p) for p in NORMS]
    assert {f.figure for f in found} == {1.0}


@pytest.mark.parametrize(
    ("build", "learning_rate"), [(SUBJECTS["linen"], 0.01), (SUBJECTS["flax linen"], 0.1)]
)
def test_freshly_trained(build, learning_rate):
    """60 steps, and an average that is as quick as a short run asks."""
    net, norm = build
    model = net(functools.partial(norm, momentum=0.9))
    variables = model.init(jax.random.key(0), X, train=False)

    @jax.jit
    def step(variables, x):
        def loss(params):
            y, new = model.apply(
                {**variables, "params": params}, x, True, mutable="batch_stats"
            )
            return jnp.mean((y - jnp.sin(x[:, :3])) ** 2), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - learning_rate * g, variables["params"], grads)
        return {"params": params, **new}

    for key in jax.random.split(jax.random.key(5), 60):
        variables = step(variables, 2 * jax.random.normal(key, X.shape) + 1)
    assert diagnose(model, variables, X) == []


@each_subject
def test_never_updated_in_part(build):
    """A batch never had one of the features."""
    ill = healthy(build)
    for name, start in (("mean", 0), ("var", 1)):
        ill = ill.with_leaf(NORMS[0], name, ill.leaf(NORMS[0], name).at[3].set(start))
    (found,) = ill.diagnose()
    assert (found.kind, found.path, found.figure) == ("never_updated", NORMS[0], 1 / 8)


@each_subject
def test_stale(build):
    """The output hardly depends on the layer, so that there is no gap."""
    ill = healthy(build).scaled_stats(NORMS[1], 2)
    ill = ill.with_leaf(("head",), "bias", jnp.array([-20.0, 0, 20]))
    (found,) = ill.diagnose()
    assert (found.kind, found.path) == ("stale", NORMS[1])
    assert found.figure > found.threshold


@each_subject
@pytest.mark.parametrize("layer", NORMS)
def test_gap_with_stale_statistics(build, layer):
    found = healthy(build).scaled_stats(layer, 4).diagnose()
    assert [(f.kind, f.path) for f in found] == [
        ("train_evaluation_gap", layer), ("stale", layer),
    ]  # fmt: skip


@each_subject
def test_gap_of_one_feature(build):
    """The median feature is fine, and on this one all depends."""
    ill = healthy(build)
    ill = ill.with_leaf(NORMS[1], "scale", jnp.full(8, 0.01).at[2].set(5))
    ill = ill.with_leaf(NORMS[1], "var", ill.leaf(NORMS[1], "var").at[2].multiply(100))
    (found,) = ill.diagnose()
    assert (found.kind, found.path) == ("train_evaluation_gap", NORMS[1])


@each_subject
def test_dead_features(build):
    ill = healthy(build)
    ill = ill.with_leaf(NORMS[1], "scale", ill.leaf(NORMS[1], "scale").at[2].set(0))
    kernel = ill.leaf(("dense0",), "kernel").at[:, 4:6].set(0)
    ill = ill.with_leaf(("dense0",), "kernel", kernel)
    for name in ("mean", "var"):
        ill = ill.with_leaf(NORMS[0], name, ill.leaf(NORMS[0], name).at[4:6].set(0))
    found = [f for f in ill.diagnose() if f.kind != "train_evaluation_gap"]
    assert [(f.kind, f.path, f.figure) for f in found if f.kind == "dead_features"] == [
        ("dead_features", NORMS[0], 2 / 8), ("dead_features", NORMS[1], 1 / 8),
    ]  # fmt: skip


@each_subject
def test_low_variance(build):
    small = 1e-3 * X
    found = healthy(build, size=1e-3).diagnose(small)
    assert kinds(found) == {("low_variance", NORMS[0])}
    kernel = np.float64(healthy(build).leaf(("dense0",), "kernel"))
    variance = np.var(np.float64(small) @ kernel, 0)
    np.testing.assert_allclose(found[0].figure, variance.min() / 1e-5, 1e-3)


@each_subject
def test_half_precision(build):
    """Every eighth example is one unit in the last place of float16 away."""
    ill = healthy(build, dtype=jnp.float16)
    kernel = jnp.eye(6, 8) + jnp.eye(6, 8, 6)
    ill = ill.with_leaf(("dense0",), "kernel", kernel)
    x = jnp.full((64, 6), 4000.0).at[::8].add(4)
    found = [f for f in ill.diagnose(x) if f.path == NORMS[0]]
    assert ("half_precision", NORMS[0]) in kinds(found)
    assert ("dead_features", NORMS[0]) not in kinds(found)


@each_subject
def test_too_few_elements(build):
    found = healthy(build, examples=8).diagnose(X[:8])
    assert kinds(found) == {("too_few_elements", p) for p in NORMS}
    assert {(f.figure, f.threshold) for f in found} == {(8, 16)}


@pytest.mark.parametrize(
    ("net", "norm"),
    [(LinenNet, bn_jax.linen.GhostBatchNorm), (NnxNet, bn_jax.nnx.GhostBatchNorm)],
)
@pytest.mark.parametrize("size", [8, 32])
def test_too_few_elements_in_a_group(net, norm, size):
    build = net, functools.partial(norm, group_size=size)
    found = [f.figure for f in healthy(build).diagnose() if f.kind == "too_few_elements"]
    assert found == ([8, 8] if size == 8 else [])


@each_subject
@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_too_few_elements_on_a_device(build, axis_name):
    """64 examples on 8 replicas: 8 on each, unless they share."""
    subject = healthy(build, axis_name=axis_name)
    copies = jax.tree.map(lambda v: jnp.stack([v] * 8), subject.variables)
    found = diagnose(subject.model, copies, X.reshape(8, 8, 6), replicated=True)
    few = [] if axis_name else [("too_few_elements", p, 8) for p in NORMS]
    assert [(f.kind, f.path, f.figure) for f in found] == few
