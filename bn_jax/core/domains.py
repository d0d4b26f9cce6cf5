"""Statistics per domain: a batch of examples from several distributions, each by its own.

Domain-specific batch normalisation (Chang et al. 2019), and, with clean and adversarial
examples as the domains, the auxiliary one of AdvProp (Xie et al. 2020). Statistics are
`[D, features]`; estimators go over the domains by `jax.vmap(ema)(stats, batch)`, with
`BatchStats.create(features, domains=D)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from bn_jax.core import sync as _sync
from bn_jax.core.arrays import (
    Axes,
    as_axes,
    at_least_one,
    examples_axis,
    feature_shape,
    promoting,
    shape_of,
    shard,
    sharded_like,
    split_axes,
    weights,
)
from bn_jax.core.batch_norm import normalize
from bn_jax.core.moments import Moments, moments
from bn_jax.core.numbers import check_epsilon


@promoting
def domain_batch_norm(
    x: jax.Array,
    domain: jax.Array,
    num_domains: int,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: jax.Array | float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: Hashable | None = None,
    sync: Callable[..., Moments] = _sync.sync,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` of the examples of every domain by themselves.

    The work does not grow with the number of domains: their moments merge from those of
    each example.

    Args:
      x, axis, mask, axis_name, sync: as in `batch_norm`; examples lie along the
        first axis of x that is not a feature axis.
      domain: `[examples]` int, 0 to num_domains - 1. Examples of another number count
        nowhere, and their y and its derivatives are NaN; padding is for the mask.
      num_domains: D.
      scale, bias: `[features]`, shared, or `[D, features]`.
      epsilon: a number, or an array like scale.

    Returns:
      y of x's shape, and the Moments of each domain: `[D, features]`, count `[D]` or `[D,
      features]` where the mask differs between features (0 for a domain without examples).

    Raises:
      TypeError, ValueError: as `batch_norm`; or a domain that is not one int per example.
    """
    x, axis = jnp.asarray(x), as_axes(axis)
    num_domains = at_least_one(num_domains=num_domains)
    first, domain = _check_domain(x, domain, num_domains, axis)
    each = _moments_of_examples(x, first, axis, weights(x, mask))

    def total(tree):
        return jax.tree.map(lambda v: _of_each_domain(v, domain, num_domains), tree)

    local = _sync.pool(each, total, functools.partial(_of_each_example, domain=domain))
    batch = local if axis_name is None else jax.vmap(lambda m: sync(m, axis_name))(local)
    y = domain_normalize(
        x, domain, batch.mean, batch.var, scale, bias, axis=axis, epsilon=epsilon
    )
    return y, batch


@promoting
def domain_normalize(
    x: jax.Array,
    domain: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: jax.Array | float = 1e-5,
) -> jax.Array:
    """`normalize` of each example with the statistics `[D, features]` of its domain.

    Arguments as in `domain_batch_norm`. This is inference with running statistics.
    """
    x, axis = jnp.asarray(x), as_axes(axis)
    check_epsilon(epsilon)
    features = feature_shape(x.shape, axis)
    num_domains = next(iter(shape_of(mean)), 0)
    first, domain = _check_domain(x, domain, num_domains, axis)
    others = tuple(a - (a > first) for a in split_axes(x.shape, axis)[1] if a != first)

    def widened(name: str, v: Any) -> Any:
        shared = [features] * (name not in ("mean", "var")) + [()] * (name == "epsilon")
        if v is None or shape_of(v) in shared:
            return v
        if shape_of(v) != (num_domains, *features):
            raise ValueError(
                f"{name} of shape {shape_of(v)} for {num_domains} domains and "
                f"{features} features"
            )
        v = _of_each_example(v, domain)
        return jax.vmap(lambda row: jnp.expand_dims(row, others), out_axes=first)(v)

    given = {"mean": mean, "var": var, "scale": scale, "bias": bias, "epsilon": epsilon}
    return normalize(x, **{name: widened(name, v) for name, v in given.items()}, axis=axis)


def _of_each_domain(v, domain, num_domains):
    """The sums over the examples of every domain."""
    return jax.ops.segment_sum(v, domain, num_domains, out_sharding=sharded_like(v, None))


def _of_each_example(v, domain):
    v = jnp.asarray(v)
    (examples,) = jax.typeof(domain).sharding.spec
    return v.at[domain].get(
        mode="fill", fill_value=jnp.nan, out_sharding=sharded_like(v, examples)
    )


def _moments_of_examples(x, first, axis, w):
    """Moments with the examples as first axis, `[examples, features]`."""
    kept = tuple(a - (a > first) for a in split_axes(x.shape, axis)[0])
    if w is not None:
        w = jnp.broadcast_to(w, (*w.shape[:first], x.shape[first], *w.shape[first + 1 :]))
        w = shard(w, jax.typeof(x).sharding.spec[first], first)

    def one(x, mask):
        return moments(x, axis=kept, mask=mask)

    return jax.vmap(one, (first, None if w is None else first))(x, w)


def _check_domain(x, domain, num_domains, axis):
    """The axis of the examples, and the domains with all that do not exist as one of them."""
    first = examples_axis(x, axis)
    domain, examples = jnp.asarray(domain), x.shape[first]
    if domain.shape != (examples,) or not jnp.issubdtype(domain.dtype, jnp.integer):
        raise ValueError(
            f"domain of shape {domain.shape} and {domain.dtype}: one int for each of "
            f"{examples} examples"
        )
    return first, jnp.where(domain < 0, num_domains, domain)
