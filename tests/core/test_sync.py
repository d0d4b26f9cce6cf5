"""Replicas that share statistics, in groups and by one collective, against the oracle."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec as P

from bn_jax import Moments, batch_norm, merge, moments
from bn_jax.core.sync import sync, sync_once

GROUPS = {"all": None, "pairs": [[0, 3], [2, 1]], "unequal": [[0, 2, 3], [1]]}
COUNTS = [(4, 1, 2, 3), (4, 1, 2, 0), (0, 3, 0, 0)]
# pmap is shard_map(check_vma=False) since JAX 0.8, so one of them will do.
each_map = pytest.mark.parametrize("replicate", ["pmap", "vmap", "shard_map"], indirect=True)
every_sync = pytest.mark.parametrize("sync", [sync, sync_once])


def draw(counts, mean=0.0):
    """Four replicas of four examples, of which `counts` are valid."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 4, 3)) + mean + np.reshape([-3, 4, 0, 9], (4, 1, 1))
    mask = np.arange(4)[None, :, None] < np.reshape(counts, (4, 1, 1))
    return np.where(mask, x, 0).astype(np.float32), mask


def group_of_each(groups):
    return [next(g for g, members in enumerate(groups) if i in members) for i in range(4)]


def assert_moments(got, want, rtol=1e-5, atol=1e-6):
    for name in Moments._fields:
        values = np.broadcast_to(getattr(got, name), getattr(want, name).shape)
        np.testing.assert_allclose(values, getattr(want, name), rtol, atol, err_msg=name)


def of_replica(everyone, i):
    return Moments(*(v[i] for v in everyone))


@pytest.mark.parametrize(
    ("groups", "sync"), [("unequal", sync), ("pairs", sync_once), ("all", sync_once)]
)
@each_map
def test_gradients(replicate, groups, sync):
    rng, groups = np.random.default_rng(1), GROUPS[groups]
    scale, bias = rng.normal(size=(2, 3)).astype(np.float32)
    dy, of_seen = rng.normal(size=(4, 4, 3)), rng.normal(size=(2, 4, 3))

    def one(x, scale, bias, mask):
        y, seen = batch_norm(
            x, scale, bias, mask=mask, epsilon=0.1, sync=sync, allow_single=True,
            axis_name="batch", axis_index_groups=groups,
        )  # fmt: skip
        return y, seen.mean, seen.var

    @functools.partial(jax.grad, argnums=range(3))
    def gradients(x, scale, bias, mask):
        copies = (jnp.stack([v] * 4) for v in (scale, bias))
        outputs = replicate(one)(x, *copies, mask)
        return sum(map(jnp.vdot, map(np.float32, (dy, *of_seen)), outputs))

    f = jax.jit(gradients)
    group = np.array(group_of_each(groups or [range(4)]))
    number = max(group) + 1
    parts = reference.Parts(np.repeat(group, 4), number)
    # What the replicas of a group ask of its moments adds up.
    of_groups = ([v[group == g].sum(0) for g in range(number)] for v in of_seen)
    arguments = parts, dy.reshape(16, 3), *map(list, of_groups), [scale] * number, -1, 0.1
    for counts in COUNTS[:2]:
        x, mask = draw(counts)
        want = reference.gradients_of_parts(x.reshape(16, 3), *arguments, mask.reshape(16, 1))
        got = f(x, scale, bias, mask)
        wanted = want.x.reshape(4, 4, 3), want.scale.sum(0), want.bias.sum(0)
        for v, w in zip(got, wanted, strict=True):
            np.testing.assert_allclose(v, w, 1e-4, 1e-4)


def test_groups_do_not_poison_each_other(replicate):
    groups = [[0, 1], [2, 3]]
    x, _ = draw((4, 4, 4, 4))
    bad = x.copy()
    bad[3] = np.nan

    def one(x):
        options = {"axis_name": "batch", "axis_index_groups": groups}
        ys, seen = zip(
            *(batch_norm(x, sync=s, **options) for s in (sync, sync_once)), strict=True
        )
        return sum(ys), seen

    def loss(x):
        y, seen = replicate(one)(x)
        return jnp.sum(jnp.where(np.arange(4)[:, None, None] < 2, y**3, 0)), seen

    f = jax.jit(jax.grad(loss, has_aux=True))
    (want_dx, want), (dx, got) = f(x), f(bad)
    np.testing.assert_allclose(dx[:2], want_dx[:2], 1e-6)
    for g, w in zip(got, want, strict=True):
        assert_moments(jax.tree.map(lambda v: v[:2], g), jax.tree.map(lambda v: v[:2], w))
        assert np.all(np.isnan(g.mean[2:]))


@every_sync
@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[3, 0, 1], [2]]], ids=str)
def test_groups_of_replicated_input(make_mesh, groups, sync):
    x, _ = draw((4, 4, 4, 4))

    def one(x):
        y, seen = batch_norm(
            x, axis_name="batch", axis_index_groups=groups, sync=sync, allow_single=True
        )
        return jax.tree.map(lambda v: v[None], (y, seen))

    mapped = jax.shard_map(one, mesh=make_mesh(batch=4), in_specs=P(), out_specs=P("batch"))
    y, seen = jax.jit(mapped)(x[0])
    want, want_seen = reference.batch_norm(x[0])
    for i in range(4):
        copies = next(len(g) for g in groups if i in g)
        assert_moments(of_replica(seen, i), want_seen._replace(count=copies * want_seen.count))
        np.testing.assert_allclose(y[i], want, 1e-5, 1e-5)


@every_sync
@pytest.mark.parametrize("spec", [P(("data", "model")), P()], ids=str)
def test_over_two_axes_the_result_is_replicated(make_mesh, spec, sync):
    x = draw((4, 4, 4, 4))[0].reshape(16, 3)
    f = jax.shard_map(
        lambda x: moments(x, axis_name=("data", "model"), sync=sync),
        mesh=make_mesh(data=2, model=2), in_specs=spec, out_specs=P(),
    )  # fmt: skip
    want = reference.moments(x)
    copies = 4 if spec == P() else 1
    assert_moments(jax.jit(f)(x), want._replace(count=want.count * copies))


# From 2e19 on the square of the distance to an empty replica's mean, 0, is inf.
@pytest.mark.parametrize(("mean", "noise"), [(1e20, 1e-3), (-3e30, 0)])
def test_an_empty_part_has_no_say_at_any_mean(mean, noise):
    x, mask = draw((4, 1, 2, 0))
    x = np.where(mask, mean * (1 + noise * x), 0).astype(np.float32)
    want = reference.moments(x.reshape(16, 3), mask=mask.reshape(16, 1))

    def close(got):
        np.testing.assert_allclose(got.mean, want.mean, 1e-6)
        np.testing.assert_allclose(got.var, want.var, 1e-3, (1e-6 * mean) ** 2)

    for s in (sync, sync_once):
        f = functools.partial(moments, axis_name="batch", sync=s)
        f = jax.vmap(lambda x, m, f=f: f(x, mask=m), axis_name="batch")
        everyone = jax.jit(f)(x, mask)
        for i in range(4):
            close(of_replica(everyone, i))
    one = jax.jit(lambda x, mask: moments(x, mask=mask))
    parts = [one(v, m) for v, m in zip(x, mask, strict=True)]
    close(functools.reduce(merge, parts))
    for some, none in [(parts[0], parts[3]), (parts[2], parts[3])]:
        for got in (merge(some, none), merge(none, some)):
            jax.tree.map(np.testing.assert_array_equal, got, some)


def test_groups_that_do_not_fit_are_refused():
    x = jnp.ones((4, 2, 3))
    for groups in ([[0, 1], [2]], [[0, 1], [1, 2, 3]], [[0, 1], [2, 4]], [[0, 1, 2, 3, 4]]):
        for s in (sync, sync_once):
            f = functools.partial(moments, axis_name="batch", axis_index_groups=groups, sync=s)
            with pytest.raises(ValueError, match=re.escape(f"axis_index_groups={groups}")):
                jax.vmap(f, axis_name="batch")(x)


COLLECTIVE = r"= .*\b(all-[a-z-]+|reduce-scatter|collective-permute)(?:-start)?\("


def collectives(f, *arguments):
    """Those of the compiled program; and how many were written, of which XLA combines some."""
    lowered = jax.jit(f).lower(*arguments)
    compiled = re.findall(COLLECTIVE, lowered.compile().as_text())
    return compiled, lowered.as_text().count("stablehlo.all_reduce")


@pytest.mark.parametrize("mapped", ["pmap", "shard_map"])
@pytest.mark.parametrize(("sync", "forward"), [(sync, 2), (sync_once, 1)])
def test_number_of_collectives(make_mesh, mapped, sync, forward):
    """Of which the backward pass has one, with the gradients of scale and bias."""

    def over_devices(f, out_specs):
        if mapped == "pmap":
            return jax.pmap(f, axis_name="batch", in_axes=(0, None, None))
        specs = {"in_specs": (P("batch"), P(), P()), "out_specs": out_specs}
        return jax.shard_map(f, mesh=make_mesh(batch=4), **specs)

    def f(x, scale, bias):
        return batch_norm(x, scale, bias, axis_name="batch", sync=sync)[0]

    def of_x(x, scale, bias):
        y, vjp = jax.vjp(lambda x: f(x, scale, bias), x)
        return y, vjp(jnp.cos(y))[0]

    def of_all(x, scale, bias):
        y, vjp = jax.vjp(f, x, scale, bias)
        return y, vjp(jnp.cos(y))

    arguments, sharded = (jnp.ones((4, 4, 3)), jnp.ones(3), jnp.zeros(3)), P("batch")
    found = collectives(over_devices(f, sharded), *arguments)
    assert found == (["all-reduce"] * forward, forward)
    found = collectives(over_devices(of_x, (sharded, sharded)), *arguments)
    assert found == (["all-reduce"] * (forward + 1), forward + 1)
    # shard_map writes those of scale and bias apart, and XLA combines them.
    specs = sharded, (sharded, P(), P())
    compiled, _ = collectives(over_devices(of_all, specs), *arguments)
    assert compiled == ["all-reduce"] * (forward + 1)
