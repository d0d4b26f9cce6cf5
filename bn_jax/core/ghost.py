"""Ghost batch normalisation: statistics of small groups of a large batch.

Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", algorithm 1. The group, not
the batch or the device, decides how noisy the statistics are: n devices have the groups that
one has.
"""

from __future__ import annotations

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.core import sync as _sync
from bn_jax.core.arrays import (
    Axes,
    as_axes,
    at_least_one,
    check_some,
    examples_axis,
    promoting,
    shard,
    shards,
    weights,
    widen,
    widen_epsilon,
)
from bn_jax.core.batch_norm import batch_norm, refuse_single
from bn_jax.core.moments import Moments
from bn_jax.core.numbers import check_epsilon


@promoting
def ghost_batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    group_size: int,
    strided: bool = False,
    axis: Axes = -1,
    epsilon: jax.Array | float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: Hashable | None = None,
    allow_single: bool = False,
    **options,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` of every group of `group_size` examples by itself.

    Examples lie along the first axis of x that is not a feature axis.

    Args:
      x, scale, bias, axis, epsilon, mask, allow_single: as in `batch_norm`.
      group_size: examples in a group, at most; where it does not divide the batch the last
        group, or with `strided` the last groups, are smaller.
      strided: of G groups example i is in group i mod G, in place of runs of neighbours.
      axis_name: mapped axis over which the batch is laid out, device after device. A group
        is of the whole batch: part of a device's examples, or those of several devices.
      **options: activation, dtype and sync of `batch_norm`.

    Returns:
      y of x's shape, and the Moments of every group of the whole batch, `[groups,
      features]` with a count `[groups]`, or `[groups, features]` where the mask differs
      between features.

    Raises:
      TypeError, ValueError: as `batch_norm`; a group_size below 1, or one that does not
        fit the devices.
    """
    x, axis = jnp.asarray(x), as_axes(axis)
    check_some(x)
    first = examples_axis(x, axis)
    group_size = check_groups(group_size, strided)
    check_epsilon(epsilon)
    if "axis_index_groups" in options:
        raise ValueError("axis_index_groups with ghost batches: group_size makes the groups")
    options = {"axis": axis, "allow_single": True, **options}
    vectors = *widen(x, axis, scale=scale, bias=bias), widen_epsilon(x, axis, epsilon)
    given = x, *vectors, weights(x, mask)
    n, size = x.shape[first], 1 if axis_name is None else lax.axis_size(axis_name)
    if isinstance(n, int):  # known (`jax.export`); else the last group is filled up
        group_size = min(group_size, n * size)
    devices = _devices_in_a_group(n, size, group_size, strided)
    examples = n if devices == 1 else n * size
    groups = -(-examples // group_size)
    smallest = examples // groups if strided else examples - (groups - 1) * group_size
    if not allow_single:
        refuse_single((*x.shape[:first], smallest, *x.shape[first + 1 :]), axis)
    if devices > 1 and not strided:
        return _spanning(given, devices, size, axis_name, options)
    shared = axis_name if devices > 1 else None
    options["axis_name"] = shared
    per_group = -(-n // groups) if strided else group_size
    y, batch = _split(given, first, groups, per_group, strided, options)
    if axis_name is None or shared:
        return y, batch
    everyone = _sync.gather(batch, axis_name)
    return y, jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), everyone)


def check_groups(group_size: int, strided: bool) -> int:
    """group_size, an integer of at least 1.

    Raises:
      TypeError: another kind of group_size or of strided.
      ValueError: a smaller one.
    """
    if not isinstance(strided, bool):
        raise TypeError(f"strided={' '.join(repr(strided).split())}: it must be a bool")
    return at_least_one(group_size=group_size)


def _devices_in_a_group(n, size, group_size, strided):
    """1 where groups are of one device's examples; checks that they fit."""
    if size == 1:
        return 1
    if strided:
        groups = n * size // group_size
        fits, devices = n * size % group_size == 0 and n % groups == 0, size
        remedy = f"{n * size} over the group size must be whole and divide {n}"
    else:
        fits, devices = n % group_size == 0 or group_size % n == 0, max(1, group_size // n)
        remedy = f"choose a size that divides, or is a multiple of, {n}"
    if not fits:
        raise ValueError(
            f"{'strided ' if strided else ''}groups of {group_size} do not fit {size} devices "
            f"of {n} examples: {remedy}"
        )
    return devices


def _spanning(given, devices, size, axis_name, options):
    """Each run of `devices` devices is one group, the last one perhaps shorter."""
    x, scale, bias, epsilon, mask = given
    options = {"epsilon": epsilon, "mask": mask, **options}
    every = list(range(size))
    together = [every[i : i + devices] for i in range(0, size, devices)]
    y, batch = batch_norm(
        x, scale, bias, axis_name=axis_name, axis_index_groups=together, **options
    )
    everyone = _sync.gather(batch, axis_name)
    return y, jax.tree.map(lambda v: v[::devices], everyone)


def _split(given, first, groups, per_group, strided, options):
    """vmap over the groups, of which the last is filled up with masked examples."""
    x, *vectors, mask = given
    n, names = x.shape[first], jax.typeof(x).sharding.spec[first]
    padding = groups * per_group - n
    if padding:
        real = jnp.arange(n).reshape([-1 if a == first else 1 for a in range(x.ndim)]) >= 0
        mask = real if mask is None else jnp.broadcast_to(mask, _at(mask.shape, first, n))

    # On an explicit mesh a sharded axis is split into parts that devices share out evenly.
    even = not padding and (per_group if strided else groups) % shards(x, first) == 0

    def split(v):
        if v is None or jnp.ndim(v) == 0 or v.shape[first] == 1 != n:
            return v, None
        v = shard(v, names if even else None, first)
        v = jnp.pad(v, [(0, padding if a == first else 0) for a in range(v.ndim)])
        parts = (per_group, groups) if strided else (groups, per_group)
        return v.reshape(*v.shape[:first], *parts, *v.shape[first + 1 :]), first + strided

    def one_group(x, scale, bias, epsilon, mask):
        return batch_norm(x, scale, bias, epsilon=epsilon, mask=mask, **options)

    parts, in_axes = zip(*map(split, (x, *vectors, mask)), strict=True)
    out_axes = first + strided, 0
    y, batch = jax.vmap(one_group, in_axes, out_axes)(*parts)
    y = y.reshape(_at(x.shape, first, groups * per_group))
    return shard(lax.slice_in_dim(y, 0, n, axis=first), names, first), batch


def _at(shape, axis, size):
    return (*shape[:axis], size, *shape[axis + 1 :])
