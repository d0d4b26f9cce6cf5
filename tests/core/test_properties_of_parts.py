"""Parts of a batch, merged or on replicas, are one batch: for every input."""

import functools

import jax
import numpy as np
import pytest
import reference
import tolerances
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from strategies import REPLICATED, Values, cases, holds, make
from subjects import compiled, cotangents_of, exact, exact_gradients, measure, normalise
from tolerances import assert_close, assert_moments

from bn_jax.core.moments import Moments, merge
from bn_jax.core.sync import sync, sync_once


def measure_parts(layout, x, mask):
    return jax.vmap(functools.partial(measure, layout))(x, mask)


def merge_two(layout, a, b):
    return merge(a, b)


@holds(500, case=cases(REPLICATED))
def test_any_tree_of_merges_has_the_moments_of_the_whole(case):
    layout, recipe = case
    v, rng = make(layout, recipe), np.random.default_rng(recipe.seed + 1)
    found, join = compiled(measure_parts, layout)(v.x, v.mask), compiled(merge_two, layout)
    parts = [Moments(*(f[i] for f in found)) for i in range(len(v.x))]
    while len(parts) > 1:
        a, b = (parts.pop(rng.integers(len(parts))) for _ in range(2))
        parts.append(join(a, b))
    want = reference.moments(v.clean, v.axis, v.mask)
    assert_moments(parts[0], want, v.elements, len(v.x))


@holds(300, case=cases(REPLICATED))
def test_the_empty_moments_are_the_identity(case):
    layout, v = case[0], make(*case)
    found, join = compiled(measure, layout)(v.x, v.mask), compiled(merge_two, layout)
    empty = jax.tree.map(np.zeros_like, found)
    for same in join(found, empty), join(empty, found):
        jax.tree.map(np.testing.assert_array_equal, same, found)


def over_shards(f, **_):
    """As `jax.pmap`, of a mask and x that are split and of the rest, which is not."""

    def one(mask, x, *rest):
        mask, x = jax.tree.map(lambda v: v[0], (mask, x))
        return jax.tree.map(lambda v: v[None], f(mask, x, *rest))

    mesh = jax.make_mesh((8,), ("replica",), axis_types=(AxisType.Auto,))
    specs = P("replica"), P("replica"), P(), P(), P()
    return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P("replica"))


def differentiate(layout, over, sync, groups, mask, arguments, cotangents):
    f = functools.partial(
        normalise, layout, sync=sync, axis_name="replica", axis_index_groups=groups
    )
    f = over(f, in_axes=(0, 0, None, None, None), axis_name="replica")
    outputs, vjp, counts = jax.vjp(functools.partial(f, mask), *arguments, has_aux=True)
    return *outputs, *counts, vjp(cotangents)


def those(v: Values, group) -> Values:
    mask = None if v.mask is None else v.mask[group]
    return v._replace(x=v.x[group], clean=v.clean[group], padded=v.padded[group], mask=mask)


def assert_replicas_are_one_device(case, over, sync, groups):
    layout, recipe = case
    v = make(layout, recipe)
    n = len(v.x)
    groups_of = [list(g) for g in groups or (range(n),)]
    dy, dmean, dvar = cotangents = tuple(
        np.zeros((n, *shape), layout.wide)
        for shape in (layout.shape[1:], layout.features, layout.features)
    )
    for g in groups_of:
        dy[g], dmean[g], dvar[g] = cotangents_of(recipe, those(v, g))
    run = compiled(differentiate, layout, over, sync, groups)
    y, *seen, got = run(v.mask, (v.x, v.scale, v.bias, v.epsilon), cotangents)
    found = []
    for g in groups_of:
        part, given = those(v, g), (dy[g], dmean[g].sum(axis=0), dvar[g].sum(axis=0))
        want, want_seen = exact(part)
        assert_close(y[g], want, tolerances.of_y(part, n), "y", ~part.padded)
        for i in g:
            assert_moments(Moments(*(s[i] for s in seen)), want_seen, part.elements, n)
        want, allowed = exact_gradients(part, *given), tolerances.of_gradients(part, *given, n)
        assert_close(got[0][g], want.x, allowed.x, "dx")
        found.append((want[1:], allowed[1:]))
    # Of what all groups share, the sum over them.
    for k, name in enumerate(("scale", "bias", "epsilon")):
        want, allowed = (sum(of[k] for of in each) for each in zip(*found, strict=True))
        assert_close(got[k + 1], want, allowed, f"d{name}")


GROUPS = (0, 3, 5, 6), (1, 2, 4, 7)
SHARED = [(sync, None), (sync_once, GROUPS), (sync, GROUPS)]


@holds(500, case=cases(REPLICATED), shared=st.sampled_from(SHARED))
def test_replicas_under_vmap_are_one_device(case, shared):
    assert_replicas_are_one_device(case, jax.vmap, *shared)


@pytest.mark.parametrize("over", [jax.pmap, over_shards])
@holds(100, case=cases(REPLICATED[::2]), shared=st.sampled_from(SHARED))
def test_devices_are_one_device(over, case, shared):
    assert_replicas_are_one_device(case, over, *shared)
