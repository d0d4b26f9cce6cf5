"""Norms in place of a BatchNorm: each a function of one call of that, on its variables.

    y = scale f(x) + bias,    with f

    none      x, without scale
    layer     (x - mean) / sqrt(var + epsilon) over the features (Ba et al. 2016)
    group     over groups of channels and all positions (Wu & He 2018)
    instance  over all positions (Ulyanov et al. 2016)
    rms       x / sqrt(mean x^2 + epsilon) over the features (Zhang & Sennrich 2019)
    dyt       tanh(alpha x) (Zhu et al. 2025, "Transformers without Normalization")

and `bn`, `ghost` and `renorm` as in `bn_jax.core`. Statistics of one example are the same on
every device and in evaluation: `axis_name` has no part in them. A mask has one in those over
positions; where it leaves nothing of a group all of that counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bn_jax.linen
from bn_jax.core.arrays import (
    abs2,
    accumulation_dtype,
    at_least_one,
    examples_axis,
    inverse_std,
    promoting,
    split_axes,
    weights,
    widen,
)
from bn_jax.core.batch_norm import batch_norm, result_type
from bn_jax.core.ghost import ghost_batch_norm
from bn_jax.core.layer import forward
from bn_jax.core.renorm import PAPER_D_MAX, PAPER_R_MAX, Bound, batch_renorm
from bn_jax.core.running import BatchStats
from bn_jax.surgery.calls import Call

MOST_GROUPS = 32  # Wu & He 2018
# Of a layer: what a BatchNorm of ours has as well.
_SETTINGS = (
    "dtype", "axis_name", "axis_index_groups", "estimator", "unbiased", "skip_nonfinite",
    "activation", "allow_single",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Site:
    """One call of a BatchNorm, to be computed otherwise.

    Attributes:
      call: of the layer.
      leaves: its variables by our names, and what the call gives in their stead.
      initializing: whether its variables are being made.
    """

    call: Call
    leaves: dict[str, jax.Array]
    initializing: bool

    @property
    def x(self) -> jax.Array:
        """The input."""
        return jnp.asarray(self.call.x)

    @property
    def features(self) -> tuple[int, ...]:
        """The feature axes."""
        return split_axes(self.x.shape, self.call.axis)[0]

    @property
    def examples(self) -> int:
        """The axis of the examples: the first that is no feature axis."""
        return examples_axis(self.x, self.features)

    @property
    def stats(self) -> BatchStats:
        """The running statistics."""
        return BatchStats(
            **{"count": jnp.int32(0)}
            | {n: self.leaves[n] for n in BatchStats._fields if n in self.leaves}
        )

    @property
    def vectors(self) -> list[jax.Array | None]:
        """Scale and bias in x's rank; None where there is none."""
        given = {name: self.leaves.get(name) for name in ("scale", "bias")}
        return widen(self.x, self.call.axis, **given)


class Result(NamedTuple):
    """What a norm returns, and the running statistics after it, if it has use for them."""

    y: jax.Array
    stats: BatchStats | None = None


def none(site: Site) -> Result:
    """Returns x + bias."""
    return _finished(site, site.x, scaled=False)


def layer(site: Site) -> Result:
    """Returns x normalised over its features, each position by itself."""
    kept = [a for a in range(site.x.ndim) if a not in site.features]
    return _finished(site, _standardized(site, site.x, kept))


def instance(site: Site) -> Result:
    """Returns x normalised over the positions, each feature of an example by itself."""
    return _finished(site, _standardized(site, site.x, [site.examples, *site.features], True))


def group(site: Site, *, num_groups: int | None = None) -> Result:
    """Returns x normalised over groups of channels.

    Args:
      site: the call.
      num_groups: by default the most, up to 32, that divide the channels evenly and leave
        more than one element to a group.
    """
    shape, (channels, *others) = site.x.shape, site.features
    if others:
        raise ValueError(
            f"group takes one feature axis, and this BatchNorm has {site.features}"
        )
    size, positions = shape[channels], math.prod(shape) // shape[channels]
    least = 1 if positions > shape[site.examples] else 2
    fits = [n for n in range(1, MOST_GROUPS + 1) if size % n == 0 and size // n >= least]
    groups = max(fits, default=1) if num_groups is None else at_least_one(num_groups=num_groups)
    if size % groups:
        raise ValueError(f"{size} channels do not split into {groups} groups: choose a divisor")
    parts = (*shape[:channels], groups, size // groups, *shape[channels + 1 :])
    examples = site.examples + (site.examples > channels)
    y = _standardized(site, site.x.reshape(parts), [examples, channels], True)
    return _finished(site, y.reshape(shape))


def rms(site: Site) -> Result:
    """Returns x over the root of its mean square over the features."""
    x = site.x.astype(accumulation_dtype(site.x))
    square = jnp.mean(abs2(x), site.features, keepdims=True)
    return _finished(site, x * inverse_std(square, site.call.epsilon))


def dyt(site: Site, *, alpha: float = 0.5) -> Result:
    """Returns tanh(alpha x).

    Args:
      site: the call.
      alpha: what the parameter of this name, a number, starts from.
    """
    x = site.x.astype(accumulation_dtype(site.x))
    return _finished(site, jnp.tanh(site.leaves["alpha"] * x))


def bn(site: Site) -> Result:
    """Returns what `bn_jax`'s BatchNorm does with the layer's settings."""
    return _running(site, batch_norm)


def ghost(site: Site, *, group_size: int = 32, strided: bool = False) -> Result:
    """Returns x normalised over groups of examples; see `bn_jax.ghost_batch_norm`."""
    of_groups = functools.partial(ghost_batch_norm, group_size=group_size, strided=strided)
    return _running(site, of_groups)


def renorm(site: Site, *, r_max: Bound = PAPER_R_MAX, d_max: Bound = PAPER_D_MAX) -> Result:
    """Returns x batch-renormalised; `bn_jax.batch_renorm` has the bounds."""
    function = functools.partial(
        batch_renorm, stats=site.stats,
        r_max=r_max, d_max=d_max,
    )  # fmt: skip
    return _running(site, function)


def of_function(function: Callable[..., jax.Array], site: Site) -> Result:
    """Returns function(x, scale, bias, train=...), scale and bias in x's rank, or 1 and 0."""
    scale, bias = site.vectors
    one = jnp.ones((1,) * site.x.ndim, site.x.dtype)
    scale, bias = one if scale is None else scale, 0 * one if bias is None else bias
    y = function(site.x, scale, bias, train=not site.call.use_running_average)
    if (shape := getattr(y, "shape", None)) != site.x.shape:
        raise ValueError(f"the norm makes {shape} of an input of shape {site.x.shape}")
    return _finished(site, y, scaled=False, biased=False)


NORMS: dict[str, Callable[..., Result]] = {
    f.__name__: f for f in (none, bn, layer, group, instance, rms, ghost, renorm, dyt)
}


@promoting
def _finished(site, y, scaled=True, biased=True) -> Result:
    """With scale, bias and the layer's activation, in its dtype."""
    scale, bias = site.vectors
    dtype = result_type(getattr(site.call.layer, "dtype", None), site.x, scale, bias)
    y = y * scale if scaled and scale is not None else y
    y = y + bias if biased and bias is not None else y
    activation = getattr(site.call.layer, "activation", None) or (lambda y: y)
    return Result(activation(y).astype(dtype))


def _standardized(site, x, kept, masked=False):
    """x of mean 0 and variance 1 over the axes that are not kept, in float32 or float64."""
    reduced = split_axes(x.shape, kept)[1]
    if math.prod(x.shape[a] for a in reduced) == 1:
        raise ValueError(
            f"one element to normalise over in an input of shape {site.x.shape}: leave this "
            "BatchNorm out of `only`, or choose another norm"
        )
    mask = weights(site.x, site.call.kwargs.get("mask")) if masked else None
    if mask is not None:
        mask = jnp.broadcast_to(mask, site.x.shape).reshape(x.shape)
        some = (mask != 0).any(reduced, keepdims=True)
        mask = jnp.where(some, mask, jnp.ones((), mask.dtype))
    dtype, epsilon = accumulation_dtype(x), site.call.epsilon
    return batch_norm(x, axis=kept, epsilon=epsilon, mask=mask, dtype=dtype)[0]


def _running(site, function) -> Result:
    call, leaves = site.call, site.leaves
    fields = {n: getattr(call.layer, n) for n in _SETTINGS if hasattr(call.layer, n)}
    fields |= {"axis": call.axis, "epsilon": call.epsilon, "momentum": call.momentum}
    settings: Any = bn_jax.linen.BatchNorm(**fields, parent=None)
    mode = {"use_running_average": call.use_running_average, "mask": call.kwargs.get("mask")}
    vectors = leaves.get("scale"), leaves.get("bias")
    mode["initializing"] = site.initializing
    return Result(*forward(settings, function, site.x, site.stats, *vectors, **mode))
