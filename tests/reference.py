"""Batch normalisation in float64 NumPy, one feature at a time: what the tests believe.

It shares no code with bn_jax and, where it can, no formula: variances come from the
deviations of the elements themselves, gradients from the whole Jacobian of one feature.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Mean, biased variance, sum w and sum w^2 / sum w, each `[features]`; 0 where unseen."""

    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray
    weight: np.ndarray


class Gradients(NamedTuple):
    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    epsilon: float


def to_rows(v, shape, axis) -> np.ndarray:
    """v, broadcast to `shape`, as `[features, elements]`."""
    v = np.broadcast_to(np.asarray(v, np.float64), shape)
    kept = sorted(a % len(shape) for a in np.atleast_1d(axis))
    v = np.moveaxis(v, kept, range(len(kept)))
    return v.reshape(math.prod(v.shape[: len(kept)]), -1)


def from_rows(rows, shape, axis) -> np.ndarray:
    """The inverse of `to_rows`."""
    kept = sorted(a % len(shape) for a in np.atleast_1d(axis))
    first = [shape[a] for a in kept] + [s for a, s in enumerate(shape) if a not in kept]
    return np.moveaxis(np.reshape(rows, first), range(len(kept)), kept)


def features(shape, axis) -> tuple[int, ...]:
    return tuple(shape[a] for a in sorted(a % len(shape) for a in np.atleast_1d(axis)))


def moments(x, axis=-1, mask=None) -> Moments:
    x = np.asarray(x, np.float64)
    weights = to_rows(1 if mask is None else mask, x.shape, axis)
    found = []
    for row, w in zip(to_rows(x, x.shape, axis), weights, strict=True):
        row, w = row[w > 0], w[w > 0]
        mean = np.average(row, weights=w) if w.size else 0.0
        # The rounding of a sum of equal numbers is not to be their variance.
        mean += np.average(row - mean, weights=w) if w.size else 0.0
        var = np.average((row - mean) ** 2, weights=w) if w.size else 0.0
        found.append((mean, var, w.sum(), np.average(w, weights=w) if w.size else 0.0))
    shape = features(x.shape, axis)
    return Moments(*(np.reshape(v, shape) for v in zip(*found, strict=True)))


def normalize(x, mean, var, scale=None, bias=None, axis=-1, epsilon=1e-5) -> np.ndarray:
    x = np.asarray(x, np.float64)
    columns = [
        np.ravel(np.broadcast_to(np.asarray(v, np.float64), features(x.shape, axis)))[:, None]
        for v in (mean, var, 1 if scale is None else scale, 0 if bias is None else bias)
    ]
    mean, var, scale, bias = columns
    rows = scale * (to_rows(x, x.shape, axis) - mean) / np.sqrt(var + epsilon) + bias
    return from_rows(rows, x.shape, axis)


def batch_norm(x, scale=None, bias=None, axis=-1, epsilon=1e-5, mask=None):
    """`(y, Moments)`."""
    seen = moments(x, axis, mask)
    return normalize(x, seen.mean, seen.var, scale, bias, axis, epsilon), seen


def gradients(
    x, dy, dmean, dvar, scale=None, axis=-1, epsilon=1e-5, mask=None, through=("mean", "var")
) -> Gradients:
    """What cotangents of y, mean and var become, by the Jacobian of each feature.

    J[j, i] = dy_j/dx_i, with dmean/dx_i = w_i/n and dvar/dx_i = 2 w_i/n (x_i - mean), of
    which y feels those that `through` names.
    """
    x = np.asarray(x, np.float64)
    shape = features(x.shape, axis)
    seen = moments(x, axis, mask)
    per_feature = zip(
        to_rows(x, x.shape, axis),
        to_rows(dy, x.shape, axis),
        to_rows(1 if mask is None else mask, x.shape, axis),
        *(
            np.ravel(np.broadcast_to(np.asarray(v, np.float64), shape))
            for v in (1 if scale is None else scale, dmean, dvar, *seen)
        ),
        strict=True,
    )
    dx, dscale, dbias, depsilon = [], [], [], 0.0
    for row, g, w, s, g_mean, g_var, mean, var, count, _ in per_feature:
        std = math.sqrt(var + epsilon)
        to_mean = w / count if count else np.zeros_like(w)
        to_var = 2 * to_mean * (row - mean)
        jacobian = s / std * (np.eye(row.size) - to_mean * ("mean" in through))
        jacobian -= s / (2 * std**3) * np.outer(row - mean, to_var) * ("var" in through)
        dx.append(g @ jacobian + g_mean * to_mean + g_var * to_var)
        dscale.append(g @ (row - mean) / std)
        dbias.append(g.sum())
        depsilon -= s * (g @ (row - mean)) / (2 * std**3)
    return Gradients(
        from_rows(dx, x.shape, axis),
        np.reshape(dscale, shape),
        np.reshape(dbias, shape),
        depsilon,
    )


def ema(old, new, momentum, count) -> np.ndarray:
    """momentum old + (1 - momentum) new, and old where nothing was counted."""
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    return np.where(np.asarray(count) > 0, momentum * old + (1 - momentum) * new, old)


def debiased_ema(start, batches, seen, momentum) -> np.ndarray:
    """sum_i momentum^(t-i) batch_i / sum_i momentum^(t-i), `start` where nothing was seen.

    Haiku's hidden / (1 - momentum^t) without its difference; t counts the batches in which
    the feature was `seen`.
    """
    total, weight = np.zeros_like(start), np.zeros_like(start)
    for batch, now in zip(batches, seen, strict=True):
        total = np.where(now, momentum * total + batch, total)
        weight = np.where(now, momentum * weight + 1, weight)
    return np.where(weight > 0, total / np.maximum(weight, 1), start)


def cumulative_mean(start, batches, seen) -> np.ndarray:
    """The mean over the batches in which the feature was `seen`; `start` where it never was."""
    seen = np.stack([np.broadcast_to(v, start.shape) for v in seen])
    t = np.sum(seen, axis=0)
    total = np.sum(np.where(seen, batches, 0), axis=0)
    return np.where(t > 0, total / np.maximum(t, 1), start)


def has_variance(count, weight=1) -> np.ndarray:
    """Whether there was more than one element, of whatever weights."""
    return np.asarray(count) > (1 + 1e-5) * np.asarray(weight)


def unbiased(var, count, weight=1) -> np.ndarray:
    """n/(n-1) var with n = sum w / weight elements of equal weight, and 0 for n <= 1."""
    some = has_variance(count, weight)
    n = np.asarray(count, np.float64) / np.where(some, weight, 1)
    return np.where(some, n * var / np.where(some, n - 1, 1), 0)


def unbiased_by_pairs(x, axis=-1, mask=None) -> np.ndarray:
    """Half the mean of (x_i - x_j)^2 over i != j with weights w_i w_j; 0 where there are none.

    Its expectation is the variance, whatever the weights are.
    """
    weights = to_rows(1 if mask is None else mask, np.shape(x), axis)
    found = []
    for row, w in zip(to_rows(x, np.shape(x), axis), weights, strict=True):
        row, w = row[w > 0], w[w > 0] / max(w.max(), 1e-300)
        pairs = np.outer(w, w) * (1 - np.eye(w.size))
        squares = (row[:, None] - row) ** 2 / 2
        found.append(np.average(squares, weights=pairs) if w.size > 1 else 0.0)
    return np.reshape(found, features(np.shape(x), axis))


def merge(*parts: Moments) -> Moments:
    """By the sums of w, w x and w x^2: for means that are not large against the std."""
    count = sum(np.asarray(p.count, np.float64) for p in parts)
    some = np.where(count > 0, count, 1)
    mean = sum(p.count * np.asarray(p.mean, np.float64) for p in parts) / some
    square = sum(p.count * (p.var + np.asarray(p.mean, np.float64) ** 2) for p in parts)
    weight = sum(np.asarray(p.count, np.float64) * p.weight for p in parts) / some
    return Moments(mean, square / some - mean**2, count, weight)


def replicas(x, axis=-1, mask=None, groups=None) -> list[Moments]:
    """What each replica i, of elements `x[i]`, gets: its group's elements as one batch."""
    x = np.asarray(x, np.float64)
    mask = np.broadcast_to(1.0 if mask is None else mask, x.shape)
    axes = [a % (x.ndim - 1) + 1 for a in np.atleast_1d(axis)]
    found = [None] * len(x)
    for group in groups or [range(len(x))]:
        for i in group:
            found[i] = moments(x[list(group)], axes, mask[list(group)])
    return found


class Parts(NamedTuple):
    """Examples that are normalised by themselves, each part of them.

    Attributes:
      of: the number of the part of each example; examples lie along the first axis that is
        not a feature axis.
      number: of parts, empty ones included.
    """

    of: np.ndarray
    number: int

    def masks(self, shape, axis, mask=None):
        """For each part what is inside it, and the mask of the whole batch within it."""
        kept = [a % len(shape) for a in np.atleast_1d(axis)]
        first = next(a for a in range(len(shape)) if a not in kept)
        of = np.reshape(self.of, [-1 if a == first else 1 for a in range(len(shape))])
        for part in range(self.number):
            inside = np.broadcast_to(of == part, shape)
            yield inside, inside * (1.0 if mask is None else mask)


def batch_norm_of_parts(x, parts, scale, bias, axis=-1, epsilon=1e-5, mask=None):
    """`(y, Moments)` with Moments, scale and bias `[parts, features]`."""
    y, found = np.full(np.shape(x), np.nan), []
    masks = parts.masks(y.shape, axis, mask)
    for (inside, within), s, b in zip(masks, scale, bias, strict=True):
        own, seen = batch_norm(x, s, b, axis, epsilon, within)
        y = np.where(inside, own, y)
        found.append(seen)
    return y, Moments(*map(np.stack, zip(*found, strict=True)))


def gradients_of_parts(x, parts, dy, dmean, dvar, scale, axis=-1, epsilon=1e-5, mask=None):
    """`Gradients`, of which scale and bias are `[parts, features]`."""
    masks = parts.masks(np.shape(x), axis, mask)
    found = [
        gradients(x, np.where(inside, dy, 0), *own, axis, epsilon, within)
        for (inside, within), *own in zip(masks, dmean, dvar, scale, strict=True)
    ]
    dx, dscale, dbias, depsilon = zip(*found, strict=True)
    return Gradients(sum(dx), np.stack(dscale), np.stack(dbias), sum(depsilon))
