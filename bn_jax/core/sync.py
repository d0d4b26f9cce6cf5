"""Replicas that share statistics: their Moments merged over a mapped axis.

A replica counts with the number of its elements, so that one whose mask leaves nothing has
no say. Both functions have one meaning, `bn_jax.merge` over the replicas; they differ in
the number of collectives and in what those carry (C features, D replicas):

    sync        two all-reduces, of C + 2 and of C numbers
    sync_once   one all-reduce of D (2 C + 2) numbers: where latency is all that counts

One all-reduce of (n, sum x, sum x^2) would do too, and be wrong by a factor of 6 at
|mean| = 1e4 std.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from bn_jax.core.arrays import abs2, promoting

Groups = Sequence[Sequence[int]] | None


@promoting
def sync(local, axis_name: Hashable, axis_index_groups: Groups = None):
    """Every replica gets the Moments of all replicas' elements, by two all-reduces.

    Args:
      local: Moments of the replica's own elements.
      axis_name: mapped axis, or axes.
      axis_index_groups: groups of replicas that share, as `jax.lax.psum` takes them.
    """
    return pool(local, lambda v: all_reduce(v, axis_name, axis_index_groups))


@promoting
def sync_once(local, axis_name: Hashable, axis_index_groups: Groups = None):
    """`sync` by one all-reduce, in which every replica has a slot of its own."""
    everyone = gather(local, axis_name)
    if axis_index_groups is not None:
        group = _group_of_each(axis_index_groups, lax.axis_size(axis_name))
        mine = group == group[lax.axis_index(axis_name)]
        mine = mine.reshape((-1,) + (1,) * local.count.ndim)
        everyone = everyone._replace(count=jnp.where(mine, everyone.count, 0))
    return pool_first_axis(everyone)


@promoting
def gather(tree, axis_name: Hashable):
    """The trees of all replicas, along a new first axis, by one all-reduce.

    An all-gather would send half as much, but what it returns counts as varying over the
    devices under `shard_map(check_vma=True)`.
    """
    slots, unravel = _slots(tree, lax.axis_index(axis_name), lax.axis_size(axis_name))
    return jax.vmap(unravel)(lax.psum(slots, axis_name))


@promoting
def pool_first_axis(parts):
    """`merge` of Moments that lie along the first axis: `[parts, ...]` to `[...]`."""
    pooled = pool(parts, lambda v: jax.tree.map(_over_first, v))
    return jax.tree.map(lambda v: v[0], pooled)


@promoting
def pool(parts, total: Callable, each: Callable = lambda mean: mean):
    """The Moments of all elements from those of parts, given how to sum over the parts.

        n = sum n_i    mean = sum n_i mean_i / n
        var = sum n_i (var_i + |mean_i - mean|^2) / n    weight = sum n_i weight_i / n

    Parts of count 0 have no say, whatever their mean is, NaN and infinity included.

    Args:
      parts: Moments; each replica's own, or with the parts along an axis.
      total: from a tree of arrays to the tree of their sums over the parts.
      each: from what `total` returns to one for each part, where they differ in shape.
    """
    # A scalar count of each against means of [parts, features].
    narrow = tuple(range(parts.count.ndim, parts.mean.ndim)) if parts.count.ndim else ()
    n, weight = (jnp.expand_dims(v, narrow) for v in (parts.count, parts.weight))
    own, var = (jnp.where(n != 0, v, 0) for v in (parts.mean, parts.var))
    count, squares, weighted = total((n, n * weight, n * own))
    some = jnp.where(count != 0, count, 1)
    mean = weighted / some
    away = jnp.where(n != 0, own - each(mean), 0)
    spread = total(n * (var + abs2(away)))
    count, weight = (jnp.squeeze(v, narrow) for v in (count, squares / some))
    return parts._replace(mean=mean, var=spread / some, count=count, weight=weight)


def all_reduce(tree, axis_name: Hashable, axis_index_groups: Groups = None):
    """`lax.psum` of a tree as one collective, with groups wherever psum itself refuses them."""
    flat, unravel = ravel_pytree(tree)
    if axis_index_groups is None:
        return unravel(lax.psum(flat, axis_name))
    if _has_grouped_psum(axis_name, axis_index_groups):
        return unravel(lax.psum(flat, axis_name, axis_index_groups=axis_index_groups))
    group = _group_of_each(axis_index_groups, lax.axis_size(axis_name))
    mine = group[lax.axis_index(axis_name)]
    slots, unravel = _slots(tree, mine, len(axis_index_groups))
    return unravel(lax.psum(slots, axis_name)[mine])


def on_devices(axis_name: Hashable) -> bool:
    """Whether the axis is of `pmap` or `shard_map`, and not of `vmap`."""
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    return set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def _over_first(v):
    return jnp.sum(v, axis=0, keepdims=True)


def _slots(tree, i, size):
    """The tree as row i of zeros `[size, n]`, and the function from a row to a tree."""
    flat, unravel = ravel_pytree(tree)
    own = (jnp.arange(size) == i).reshape(size, 1)
    return jnp.where(own, flat[None], 0), unravel


def _group_of_each(groups, size):
    group = {i: g for g, members in enumerate(groups) for i in members}
    if sorted(group) != list(range(size)) or len(group) != sum(map(len, groups)):
        raise ValueError(f"axis_index_groups={groups} must have each of {size} replicas once")
    return jnp.asarray([group[i] for i in range(size)])


def _has_grouped_psum(axis_name, groups) -> bool:
    """An axis of `pmap` or of `shard_map(check_vma=False)`, and groups of one size."""
    checks_varying = jax.typeof(lax.axis_index(axis_name)).manual_axis_type.varying
    return on_devices(axis_name) and not checks_varying and len({*map(len, groups)}) == 1
