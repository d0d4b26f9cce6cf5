"""How far from the exact answer rounding may take a program that is right.

With eps the step of the dtype of the statistics (twice the largest relative error of one
operation), n elements per feature, and sums of x - c and (x - c)^2 about a shift c that lies
k std from the mean:

- a sum of n numbers is off by at most n eps/2 of the sum of their sizes (Higham 2002,
  section 4.2), here about sqrt(1 + k^2) std: so the variance is off by n eps (1 + 2 k^2) of
  itself at most; 800 eps, 1e-4 in float32, is what `moments` promises;
- the mean is off by as many std, and by its own rounding, eps |mean|;
- the mean of `parts` is rounded as often, and with it the distances between the parts, of
  which the variance has the squares;
- a square below the smallest normal number is 0.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import reference


def of_moments(seen: reference.Moments, elements: int, dtype, parts: int = 1):
    """Of mean and var, absolute, `[features]`."""
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    shift = min(256, elements // 16)
    relative = eps * min(elements * (1 + 2 * shift), 800)
    std, rounding = np.sqrt(seen.var), 2 * parts * eps * np.abs(seen.mean)
    between = 2 * rounding * std if parts > 1 else 0
    var = relative * seen.var + between + rounding**2 + 2 * tiny
    return rounding + relative * std, var


def of_y(v, parts: int = 1) -> np.ndarray:
    """Of scale h + bias, h = r (x - mean), for `strategies.Values`."""
    size, _, off = _sizes(v, parts)
    scale, bias = _column(v, v.scale, 1), _column(v, v.bias, 0)
    eps = np.finfo(v.epsilon.dtype).eps
    return reference.from_rows(off * scale * size + eps * bias, v.x.shape, v.axis)


def of_gradients(v, dy, dmean, dvar, parts: int = 1) -> reference.Gradients:
    """What one term may be off by, relatively, of the sum of the sizes of all terms."""
    size, r, off = _sizes(v, parts)
    scale, dmean, dvar = _column(v, v.scale, 1), _column(v, dmean), _column(v, dvar)
    weights, dy = (_rows(v, 1 if v.mask is None else v.mask), _rows(v, dy))
    share = weights / np.maximum(np.sum(weights, axis=1, keepdims=True), 1e-30)
    dbias, dscale = (np.sum(terms, axis=1, keepdims=True) for terms in (dy, dy * size))
    of_y = scale * r * (dy + share * (dbias + size * dscale))
    of_seen = share * (dmean + 2 * dvar * size / r)
    # The gradients through y and through the moments are rounded to x's dtype, then added.
    dx = off * (of_y + of_seen) + float(jnp.finfo(v.x.dtype).eps) * of_seen
    features = reference.features(v.x.shape, v.axis)
    return reference.Gradients(
        reference.from_rows(dx, v.x.shape, v.axis),
        np.reshape(off * dscale, features),
        np.reshape(off * dbias, features),
        np.sum(off * scale * r**2 * dscale),
    )


def _sizes(v, parts):
    """|h| + 1, and r, and by how much of it a product of three such may be off.

    h is off by at most k (|h| + 1) and r by k r, hence the product by 3 k (1 + k)^2.
    """
    seen, dtype = reference.moments(v.clean, v.axis, v.mask), v.epsilon.dtype
    mean, var = of_moments(seen, v.elements, dtype, parts)
    r = 1 / np.sqrt(seen.var + v.epsilon)
    k = (v.elements + 4) * np.finfo(dtype).eps + mean * r + np.minimum(var * r**2, 1)
    rows = reference.to_rows(v.clean, v.x.shape, v.axis) - np.reshape(seen.mean, (-1, 1))
    r, k = np.reshape(r, (-1, 1)), np.reshape(k, (-1, 1))
    return r * np.abs(rows) + 1, r, 3 * k * (1 + k) ** 2


def _rows(v, array):
    return np.abs(reference.to_rows(array, v.x.shape, v.axis))


def _column(v, vector, default=None):
    features = reference.features(v.x.shape, v.axis)
    vector = np.broadcast_to(default if vector is None else vector, features)
    return np.abs(np.reshape(vector, (-1, 1)))


def assert_close(got, want, tolerance, name="", where=True):
    """Within the tolerance and one rounding to the dtype of `got`, which may overflow.

    What overflows may be NaN as well: a sum of parts that overflow with either sign.
    """
    info = jnp.finfo(got.dtype)
    largest = float(info.max)
    overflows = np.abs(np.asarray(want, np.float64)) > largest
    want, values = (np.clip(np.asarray(v, np.float64), -largest, largest) for v in (want, got))
    allowed = tolerance + float(info.eps) * np.abs(want) + float(info.tiny)
    error = np.abs(values - want)
    bad = where & ~(error <= allowed) & ~(overflows & np.isnan(values))
    if np.any(bad):
        shown = (np.broadcast_to(v, bad.shape)[bad][:5] for v in (values, want, allowed))
        raise AssertionError("{} {}, not {} within {}".format(name, *shown))


def assert_moments(got, want: reference.Moments, elements: int, parts: int = 1):
    mean, var = of_moments(want, elements, got.var.dtype, parts)
    assert_close(got.mean, want.mean, mean, "mean")
    assert_close(got.var, want.var, var, "var")
    assert_close(got.count, want.count, 1e-5 * want.count, "count")
    assert_close(got.weight, want.weight, 1e-5 * want.weight, "weight")
    assert np.all(got.var >= 0)
