"""Findings about values that are not finite, and copies that differ."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnose_subjects import (
    NORMS,
    X,
    each_subject,
    fresh,
    healthy,
    kinds,
)
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax.surgery.diagnose import diagnose


@each_subject
@pytest.mark.parametrize(
    ("path", "name"), [(("dense1",), "kernel"), (("norm0",), "var"), (("norm1",), "scale")]
)
def test_nonfinite_variables(build, path, name):
    ill = healthy(build)
    ill = ill.with_leaf(path, name, ill.leaf(path, name).at[..., 1].set(jnp.nan))
    (found,) = ill.diagnose()
    bad = np.isnan(ill.leaf(path, name)).sum()
    assert (found.kind, found.path, found.figure) == ("nonfinite", path, bad)
    assert name in found.meaning


def test_nonfinite_in_a_variable_that_holds_a_dict():
    class Scaled(nnx.Module):
        def __init__(self):
            self.tables = nnx.Variable({"scale": jnp.array([[1, jnp.nan]])})

        def __call__(self, x):
            return x * self.tables.get_value()["scale"]

    (found,) = diagnose(*nnx.split(Scaled()), jnp.ones((4, 2)))
    assert (found.kind, found.path, found.figure) == ("nonfinite", (), 1)
    assert "1 of tables['scale']" in found.meaning


@each_subject
def test_nonfinite_activations(build):
    """float32 ends at 3.4e38: the layer's variables are finite, and its output is not."""
    ill = healthy(build).with_leaf(("dense1",), "kernel", 3e38)
    found = ill.diagnose()[0]
    assert (found.kind, found.path) == ("nonfinite", ("dense1",))


@each_subject
def test_nonfinite_operation_between_layers(build):
    """It is none of the layers: the model itself is the first to make it."""
    found = healthy(build, between=lambda x: x).diagnose()
    assert found == []
    ill = fresh(build, between=lambda x: jnp.log(x - x))
    found = ill.diagnose()
    assert kinds(f for f in found if f.kind == "nonfinite") == {("nonfinite", ())}


@each_subject
def test_nonfinite_moments(build):
    """Of values that are finite; their squares are not."""
    found = fresh(build).diagnose(X.at[0].set(1e25))
    assert (found[0].kind, found[0].path) == ("nonfinite", NORMS[0])


@each_subject
def test_replicas_disagree_along_an_axis(build):
    subject = healthy(build)
    copies = [subject.variables, subject.with_leaf(NORMS[1], "mean", 0.1).variables]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), copies[0], copies[0], copies[1])
    x = jnp.stack([X] * 3)
    found = diagnose(subject.model, stacked, x, replicated=True)
    assert kinds(found) == {("replicas_disagree", NORMS[1])}
    mean = np.float64(subject.leaf(NORMS[1], "mean"))
    largest = max(np.abs(mean).max(), 0.1)
    np.testing.assert_allclose(found[0].figure, np.abs(mean - 0.1).max() / largest, 1e-5)


@each_subject
@pytest.mark.parametrize("ill", [True, False])
def test_replicas_disagree_in_a_replicated_array(build, ill, make_mesh):
    subject = healthy(build)
    sharding = NamedSharding(make_mesh(batch=4), P())
    whole = jax.device_put(subject.leaf(("dense0",), "kernel"), sharding)
    shards = [jax.device_put(s.data + (ill and i == 2), s.device)
              for i, s in enumerate(whole.addressable_shards)]  # fmt: skip
    whole = jax.make_array_from_single_device_arrays(whole.shape, sharding, shards)
    other = jax.device_put(subject.variables, sharding)
    if isinstance(other, nnx.State):
        other["dense0"]["kernel"].set_value(whole)
    else:
        other["params"]["dense0"]["kernel"] = whole
    found = diagnose(subject.model, other, X)
    assert kinds(found) == ({("replicas_disagree", ("dense0",))} if ill else set())


NEGATIVE = {"negative": (-0.1, 1e-5), "negative epsilon": (1e-5, -1e-4), "zero": (0.0, 0.0)}


@pytest.mark.parametrize(("var", "epsilon"), NEGATIVE.values(), ids=NEGATIVE)
def test_a_variance_that_no_data_have_is_named(var, epsilon):
    """As an optimizer leaves it that takes statistics for parameters (FedAdam)."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = nn.BatchNorm(use_running_average=not train, epsilon=epsilon)
            return norm(nn.Dense(4, use_bias=False)(x))

    variables = Net().init(jax.random.key(0), X, train=False)
    stats = variables["batch_stats"]["BatchNorm_0"]
    stats["var"] = stats["var"].at[2].set(var)
    found = {f.kind: f for f in diagnose(Net(), variables, X)}
    assert found["negative_variance"].path == ("BatchNorm_0",)
    assert found["negative_variance"].figure == pytest.approx(var)
    assert "nonfinite" in found
