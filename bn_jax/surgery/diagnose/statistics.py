"""What is wrong with a layer's statistics, running and of the batch."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

from bn_jax.core.arrays import abs2
from bn_jax.surgery.diagnose.findings import Finding, share, told
from bn_jax.surgery.diagnose.watch import Norm

# Nats, of the median feature: a mean that is off by 0.45 std, or a variance by a factor of
# 1.9. Training at a high rate moves weights while the average is taken and leaves a tenth.
STALE = 0.1
# Times what sampling alone gives. The median of a layer of one feature is that feature, of
# which sampling exceeds 10 times its mean once in e^10.
SAMPLING = 10
# Wu & He 2018, "Group Normalization", table 2: below 16 the error of ResNet-50 rises.
ELEMENTS = 16
# Epsilon is then a tenth of the variance, and y 5 % short of unit variance.
EPSILONS = 10
# bfloat16 has 8 bits and float16 11: at 1000 std from 0 the std is a unit or less of the last.
HALF_RATIO = 1e3


def check_statistics(norm: Norm) -> Iterator[Finding]:
    """All that one layer, its variables and a batch show."""
    yield from _negative(norm)
    yield from _never_updated(norm)
    if norm.training:
        yield from _stale(norm)
        yield from _too_few(norm)
    yield from _cramped(norm)
    yield from _dead(norm)
    yield from _low_variance(norm)


def divergence(norm: Norm) -> tuple[float, float]:
    """Of the batch's from the running statistics, and what sampling gives on average.

    In nats, of the median feature: of the normal distributions with these moments

        KL = ((v_b/v_r - 1 - log v_b/v_r) + |m_b - m_r|^2 / v_r) / 2

    with epsilon in both variances. Without features that had no element or no update: NaN
    where there are no others. Of n independent normal elements sampling gives 1/n.
    """
    batch, epsilon = norm.seen.moments, norm.epsilon
    known = (batch.count != 0) & ~norm.at_start
    of_batch, running = batch.var + epsilon, norm.leaves["var"] + epsilon
    ratio = of_batch / running
    apart = abs2(batch.mean - norm.leaves["mean"]) / running
    found = (ratio - 1 - jnp.log(ratio) + apart) / 2
    of_mean, of_var = norm.seen.noise
    expected = (of_mean / of_batch + of_var / of_batch**2 / 2) / 2
    return _median(found, known), _median(expected, known)


def _median(v, known):
    return float(jnp.nanmedian(jnp.where(known, v, jnp.nan)))


def _negative(norm):
    """Variances that no data have, as of an optimizer that takes statistics for parameters."""
    var = norm.leaves["var"]
    bad = (var < 0) | (var + norm.epsilon <= 0)
    if bad.any():
        least = float(jnp.min(jnp.where(bad, var, jnp.inf)))
        meaning = (
            f"{told(bad)} have a running variance of {least:.2g} or so, with "
            f"epsilon={float(norm.epsilon):g}"
        )
        yield Finding("negative_variance", norm.path, least, 0, meaning)


def _never_updated(norm):
    if norm.at_start.any():
        start = told(norm.at_start)
        meaning = f"{start} have a running mean of 0 and variance of 1, as at the start"
        yield Finding("never_updated", norm.path, share(norm.at_start), 0, meaning)


def _stale(norm):
    found, expected = divergence(norm)
    threshold = max(STALE, SAMPLING * expected)
    if found > threshold:
        meaning = (
            f"batch and running statistics are {found:.2g} nats apart (sampling alone gives "
            f"{expected:.2g})"
        )
        yield Finding("stale", norm.path, found, threshold, meaning)


def _too_few(norm):
    if norm.elements < ELEMENTS:
        meaning = f"statistics are of {norm.elements:g} elements per feature"
        yield Finding("too_few_elements", norm.path, norm.elements, ELEMENTS, meaning)


def _swamped(norm):
    """Where x is rounded to half precision, far from 0, before its statistics are taken."""
    dtype = norm.layer.dtype if isinstance(norm.layer, nnx.BatchNorm) else None
    half = any(jnp.finfo(d).bits < 32 for d in (norm.dtype, dtype) if d is not None)
    return (_ratio(norm) > HALF_RATIO) & half


def _ratio(norm):
    """|mean| in units of what the layer divides by."""
    batch = norm.seen.moments
    return jnp.abs(batch.mean) / jnp.sqrt(batch.var + norm.epsilon)


def _cramped(norm):
    swamped = _swamped(norm)
    if swamped.any():
        worst = float(jnp.max(jnp.where(swamped, _ratio(norm), 0)))
        meaning = f"{told(swamped)} have a |mean| of up to {worst:.2g} std in half precision"
        yield Finding("half_precision", norm.path, worst, HALF_RATIO, meaning)


def _constant(norm):
    """Where the batch has no variance but by rounding, for other reasons than its dtype."""
    batch = norm.seen.moments
    rounding = (4 * jnp.finfo(batch.var.dtype).eps * jnp.abs(batch.mean)) ** 2
    return (batch.var <= rounding) & (batch.count != 0) & ~_swamped(norm)


def _dead(norm):
    constant, scale = _constant(norm), norm.leaves.get("scale")
    # Residual branches start with a scale of 0 (Goyal et al. 2017, section 5.1).
    trained = scale is not None and not norm.at_start.any()
    off = scale == 0 if trained else jnp.zeros_like(constant)
    dead = constant | off
    if dead.any():
        meaning = (
            f"of {dead.size} features {int(constant.sum())} have variance 0 in the batch and "
            f"{int(off.sum())} a scale of 0"
        )
        yield Finding("dead_features", norm.path, share(dead), 0, meaning)


def _low_variance(norm):
    epsilon, batch = norm.epsilon, norm.seen.moments
    low = (batch.var < EPSILONS * epsilon) & (batch.count != 0)
    low &= ~_constant(norm) & ~_swamped(norm)
    if low.any():
        least = float(jnp.min(jnp.where(low, batch.var, jnp.inf))) / epsilon
        meaning = f"{told(low)} have a variance below {EPSILONS} epsilon, {least:.2g} at least"
        yield Finding("low_variance", norm.path, least, EPSILONS, meaning)
