"""BatchNorms of NNX within `nnx.scan` and `nnx.vmap`; steps have statistics, or share them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bn_jax.nnx import BatchNorm
from bn_jax.surgery import accumulate, accumulate_exactly, diagnose, recalibrate

X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
STEPS = 4
SPLIT = {nnx.Param: 0, nnx.BatchStat: 0}
SHARED = {...: nnx.Carry}
OUT = {nnx.Intermediate: 0}


class Block(nnx.Module):
    def __init__(self, momentum, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = BatchNorm(3, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.norm(self.dense(x))) + x


class Lifted(nnx.Module):
    def __init__(self, transformation, axes, momentum=0.9):
        self.transformation = transformation
        self.axes = axes if isinstance(axes, int) else nnx.StateAxes(axes)
        create = nnx.vmap(lambda rngs: Block(momentum, rngs))
        several = nnx.split_rngs(splits=STEPS)(create)
        shared = not isinstance(axes, int) and ... in axes
        self.blocks = Block(momentum, nnx.Rngs(0)) if shared else several(nnx.Rngs(0))

    def __call__(self, x):
        if self.transformation == "vmap":
            axes = {"in_axes": (self.axes, None)}
            return nnx.vmap(Block.__call__, **axes)(self.blocks, x).mean(0)
        axes = {"in_axes": (self.axes, nnx.Carry), "out_axes": nnx.Carry}
        return nnx.scan(Block.__call__, length=STEPS, **axes)(self.blocks, x)


LIFTED = {
    "scan": ("scan", 0),
    "scan of split statistics": ("scan", OUT | SPLIT),
    "scan that shares statistics": ("scan", OUT | SHARED),
    "vmap": ("vmap", 0),
    "vmap of split statistics": ("vmap", OUT | SPLIT),
}
each_lifted = pytest.mark.parametrize(("transformation", "axes"), LIFTED.values(), ids=LIFTED)


def after_a_call(transformation, axes, momentum):
    module = Lifted(transformation, axes, momentum)
    module(X)
    return nnx.state(module, nnx.BatchStat)


def assert_stats(got, want):
    close = lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6)  # noqa: E731
    jax.tree.map(close, nnx.filter_state(got, nnx.BatchStat), want)


@each_lifted
def test_recalibrated_are_the_statistics_of_each_step(transformation, axes):
    """A momentum of 0 leaves those; where steps share them, `recalibrate` merges them."""
    model, variables = nnx.split(Lifted(transformation, axes))
    got = recalibrate(model, variables, [X])
    if axes != OUT | SHARED:
        assert_stats(got, after_a_call(transformation, axes, momentum=0.0))
        return
    block, x, seen = nnx.merge(model, variables).blocks, X, []
    for _ in range(STEPS):
        seen.append(block.dense(x))
        x = block(x)
    stats = got["blocks"]["norm"]
    np.testing.assert_allclose(stats["mean"][...], np.concatenate(seen).mean(0), 1e-5, 1e-6)
    np.testing.assert_allclose(stats["var"][...], np.concatenate(seen).var(0), 1e-5)


@each_lifted
def test_accumulated_are_those_of_a_step(transformation, axes):
    """Of equal micro-batches the Moments are those of one."""
    model, variables = nnx.split(Lifted(transformation, axes))
    batch = np.stack([X, X]), np.stack([X, X])
    got = accumulate(model, variables, lambda y, t: jnp.mean((y - t) ** 2), batch)[2]
    assert_stats(got, after_a_call(transformation, axes, momentum=0.9))
    with pytest.raises(ValueError, match="blocks/norm is within a scan or vmap"):
        accumulate_exactly(model, variables, lambda y, t: jnp.mean(y), batch)


@each_lifted
def test_diagnosed(transformation, axes):
    model, variables = nnx.split(Lifted(transformation, axes))
    variables = recalibrate(model, variables, [X])
    kinds = {finding.kind for finding in diagnose(model, variables, X)}
    assert "never_updated" not in kinds
    # Those of all steps together are none of the steps'.
    assert axes == OUT | SHARED or "stale" not in kinds


@pytest.mark.parametrize("transformation", ["scan", "vmap"])
def test_what_does_not_come_out_has_a_remedy(transformation):
    for axes in [SPLIT, SHARED] if transformation == "scan" else [SPLIT]:
        model, variables = nnx.split(Lifted(transformation, axes))
        step = accumulate, model, variables, lambda y, t: jnp.mean(y), (X[None], X[None])
        for function, *args in (recalibrate, model, variables, [X]), step, (
            diagnose, model, variables, X,
        ):  # fmt: skip
            with pytest.raises(ValueError, match=r"StateAxes\(\{nnx.Intermediate: 0, ...\}\)"):
                function(*args)
