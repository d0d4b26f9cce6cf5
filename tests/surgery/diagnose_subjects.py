"""A small model, healthy, in Linen and in NNX; and what makes it ill."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import recalibrate
from bn_jax.surgery.diagnose import diagnose
from bn_jax.surgery.tree import get_leaves

WIDTH = 8
NORMS = ("norm0",), ("norm1",)
X = 2 * jax.random.normal(jax.random.key(1), (64, 6)) + 1


class LinenNet(nn.Module):
    """Dense, norm, relu twice; then Dense. `always` is a mode that the second norm is in."""

    norm: Any
    bias: bool = False
    dropout: float = 0.0
    always: bool | None = None
    between: Any = None
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train, mask=None):
        for i in range(2):
            x = nn.Dense(WIDTH, use_bias=self.bias, dtype=self.dtype, name=f"dense{i}")(x)
            if i and self.between is not None:
                x = self.between(x)
            mode = not train if self.always is None or i == 0 else self.always
            norm = self.norm(axis_name=self.axis_name, dtype=self.dtype, name=f"norm{i}")
            x = nn.relu(norm(x, use_running_average=mode, mask=mask))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(3, dtype=self.dtype, name="head")(x)


class NnxNet(nnx.Module):
    """The same, put into a mode by `train()` and `eval()`."""

    def __init__(
        self, norm, rngs, bias=False, dropout=0.0, always=None, between=None, dtype=None,
        axis_name=None,
    ):  # fmt: skip
        for i, features in enumerate((6, WIDTH)):
            dense = nnx.Linear(features, WIDTH, use_bias=bias, dtype=dtype, rngs=rngs)
            setattr(self, f"dense{i}", dense)
            setattr(self, f"norm{i}", norm(WIDTH, axis_name=axis_name, dtype=dtype, rngs=rngs))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, dtype=dtype, rngs=rngs)
        self.always, self.between = always, between

    def __call__(self, x, mask=None):
        x = self.dropout(nnx.relu(self.norm0(self.dense0(x), mask=mask)))
        x = self.dense1(x) if self.between is None else self.between(self.dense1(x))
        x = self.norm1(x, use_running_average=self.always, mask=mask)
        return self.head(self.dropout(nnx.relu(x)))


class Subject(NamedTuple):
    """A model with its variables."""

    model: Any
    variables: Any

    def diagnose(self, *batches, **options):
        return diagnose(self.model, self.variables, *(batches or [X]), **options)

    def leaf(self, path, name):
        return get_leaves(self.model, self.variables, path)[name]

    def with_leaf(self, path, name, value):
        old = self.leaf(path, name)

        def new(at, v):
            place = [getattr(p, "key", getattr(p, "name", None)) for p in at]
            mine = [p for p in place if p in (*path, name)] == [*path, name]
            return jnp.broadcast_to(value, old.shape).astype(old.dtype) if mine else v

        changed = jax.tree_util.tree_map_with_path(new, self.variables)
        return Subject(self.model, changed)

    def scaled_stats(self, path, factor):
        """With running statistics of an input that was `factor` times as large."""
        for name, power in (("mean", 1), ("var", 2)):
            self = self.with_leaf(path, name, self.leaf(path, name) * factor**power)
        return self


SUBJECTS = {
    "linen": (LinenNet, bn_jax.linen.BatchNorm),
    "flax linen": (LinenNet, nn.BatchNorm),
    "nnx": (NnxNet, bn_jax.nnx.BatchNorm),
    "flax nnx": (NnxNet, nnx.BatchNorm),
}
every_subject = pytest.mark.parametrize("build", SUBJECTS.values(), ids=SUBJECTS)
# Of ours and of Flax's, of Linen's and of NNX's, one.
each_subject = pytest.mark.parametrize(
    "build", [SUBJECTS["linen"], SUBJECTS["flax nnx"]], ids=["linen", "flax nnx"]
)


@functools.cache
def fresh(build, **options):
    net, norm = build
    if net is NnxNet:
        return Subject(*nnx.split(net(norm, nnx.Rngs(0), **options)))
    model = net(norm, **options)
    return Subject(model, model.init(jax.random.key(0), X, train=False))


@functools.cache
def healthy(build, *, size=1.0, examples=64, axis_name=None, **options):
    """As after training: with the statistics of the first examples of `size` X."""
    alone = fresh(build, **options)
    call = {"train": True} if build[0] is LinenNet else {}
    call |= dropout_rngs(build) if options.get("dropout") else {}
    variables = recalibrate(alone.model, alone.variables, [size * X[:examples]], **call)
    # With an axis_name there is no calling it outside of a map; the variables are the same.
    return Subject(fresh(build, axis_name=axis_name, **options).model, variables)


def dropout_rngs(build):
    return {"rngs": {"dropout": jax.random.key(2)}} if build[0] is LinenNet else {}


def kinds(findings):
    return {(f.kind, f.path) for f in findings}
