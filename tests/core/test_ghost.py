"""Every group against `batch_norm` of its examples alone, in float64 NumPy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax import ghost_batch_norm


class Case(NamedTuple):
    shape: tuple[int, ...]
    group_size: int
    strided: bool = False
    axis: int | tuple[int, ...] = -1
    mask: str | None = None

    @property
    def first(self):
        """The axis of the examples."""
        kept = [a % len(self.shape) for a in np.atleast_1d(self.axis)]
        return next(a for a in range(len(self.shape)) if a not in kept)


CASES = {
    "divides": Case((8, 3), 4),
    "last group smaller": Case((10, 3), 4),
    "last groups smaller": Case((10, 3), 4, strided=True),
    "larger than the batch": Case((8, 3), 32),
    "images": Case((5, 2, 2, 3), 2, strided=True),
    "other axes": Case((3, 6, 2, 2), 4, axis=(0, -1)),
    "other axes, strided": Case((2, 2, 7, 3), 3, strided=True, axis=(0, 1)),
    "mask": Case((10, 3), 4, mask="bool"),
    "weights": Case((10, 3), 4, strided=True, mask="weights"),
    "mask per feature": Case((10, 3), 4, strided=True, mask="per feature"),
    "a group of nothing": Case((10, 3), 4, mask="group"),
    "mask of other axes": Case((5, 2, 2, 3), 2, mask="positions"),
}


def make_mask(case, rng):
    examples = [n if a == case.first else 1 for a, n in enumerate(case.shape)]
    match case.mask:
        case "bool":
            return rng.random(examples) < 0.6
        case "weights":
            return rng.choice([0, 0.3, 1, 2], examples)
        case "per feature":
            return rng.random(case.shape) < 0.6
        case "group":
            return np.reshape([0, 0, 0, 0, 1, 1, 0, 1, 1, 0], examples)
        case "positions":
            return np.array([1, 0, 1, 0.5]).reshape(1, 2, 2, 1)


def draw(case):
    rng = np.random.default_rng(0)
    x = 2 * rng.normal(size=case.shape) + np.indices(case.shape)[case.first]
    scale, bias = rng.normal(size=(2, *reference.features(case.shape, case.axis)))
    return x, scale, bias, make_mask(case, rng)


def make_parts(n, group_size, strided):
    groups = -(-n // group_size)
    of = np.arange(n) % groups if strided else np.arange(n) // group_size
    return reference.Parts(of, groups)


def cotangents(groups, shape, features):
    rng = np.random.default_rng(1)
    return (rng.normal(size=shape), *rng.normal(size=(2, groups, *features)))


def expected(x, scale, bias, mask, axis, parts):
    """y and Moments; and the gradients of the cotangents above."""
    dy, *of_seen = cotangents(parts.number, x.shape, scale.shape)
    rows = [np.broadcast_to(v, (parts.number, *v.shape)) for v in (scale, bias)]
    y, seen = reference.batch_norm_of_parts(x, parts, *rows, axis, 0.1, mask)
    back = reference.gradients_of_parts(x, parts, dy, *of_seen, rows[0], axis, 0.1, mask)
    return (y, *seen), (back.x, back.scale.sum(0), back.bias.sum(0))


def assert_close(got, want, tolerance=1e-12):
    for v, w in zip(got, want, strict=True):
        v = np.asarray(v, np.float64)
        v = v.reshape(v.shape + (1,) * (w.ndim - v.ndim))  # a count that features share
        np.testing.assert_allclose(np.broadcast_to(v, w.shape), w, tolerance, tolerance)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_group_by_itself(case, x64):
    x, scale, bias, mask = draw(case)
    parts = make_parts(case.shape[case.first], case.group_size, case.strided)

    @jax.jit
    def f(x, scale, bias):
        y, seen = ghost_batch_norm(
            x, scale, bias, group_size=case.group_size, strided=case.strided,
            axis=case.axis, mask=mask, epsilon=0.1,
        )  # fmt: skip
        return (y, seen.mean, seen.var), seen[2:]

    got, vjp, counts = jax.vjp(f, x, scale, bias, has_aux=True)
    want, gradients = expected(x, scale, bias, mask, case.axis, parts)
    differs = case.mask == "per feature"
    assert counts[0].shape == (parts.number, *(scale.shape if differs else ()))
    assert_close((*got, *counts), want)
    assert_close(vjp(cotangents(parts.number, x.shape, scale.shape)), gradients)


@pytest.mark.parametrize("strided", [False, True])
def test_scale_and_bias_of_each_example(strided, x64):
    shape, rng = (5, 2, 2, 3), np.random.default_rng(0)
    x, dy = rng.normal(size=(2, *shape))
    scale, bias = rng.normal(size=(2, 5, 1, 1, 3))
    parts, ones, zeros = make_parts(5, 2, strided), np.ones((3, 3)), np.zeros((3, 3))

    def f(x, scale, bias):
        return ghost_batch_norm(x, scale, bias, group_size=2, strided=strided)[0]

    y, vjp = jax.vjp(jax.jit(f), x, scale, bias)
    h, _ = reference.batch_norm_of_parts(x, parts, ones, zeros)
    back = reference.gradients_of_parts(x, parts, dy * scale, zeros, zeros, ones)
    assert_close([y], [scale * h + bias])
    per_example = (np.sum(v, axis=(1, 2), keepdims=True) for v in (dy * h, dy))
    assert_close(vjp(dy), (back.x, *per_example))


@pytest.mark.parametrize("strided", [False, True])
def test_nan_stays_in_its_group(strided):
    x, scale, bias, _ = draw(CASES["divides"])
    x, parts = np.float32(x), make_parts(8, 4, strided)
    (y, *_), (dx, *_) = expected(x, scale, bias, None, -1, parts)
    dy, dmean, dvar = map(np.float32, cotangents(2, x.shape, scale.shape))

    @jax.jit
    def f(x):
        y, seen = ghost_batch_norm(x, scale, bias, group_size=4, strided=strided, epsilon=0.1)
        return y, seen.mean, seen.var

    poisoned = np.where((parts.of == 1)[:, None], np.nan, x)
    got, vjp = jax.vjp(f, poisoned)
    clean = parts.of == 0
    assert_close((got[0][clean], vjp((dy, dmean, dvar))[0][clean]), (y[clean], dx[clean]), 1e-5)
    assert np.all(np.isnan(got[0][~clean]))


# pmap is shard_map(check_vma=False) since JAX 0.8, so one of them will do.
each_map = pytest.mark.parametrize("replicate", ["pmap", "vmap", "shard_map"], indirect=True)
# Of 16 examples: fewer than a device has, more with a shorter last group, and strided.
DEVICES, SIZES = 4, [(2, False), (12, False), (8, True)]


@each_map
@pytest.mark.parametrize(("size", "strided"), SIZES)
def test_groups_do_not_know_of_devices(replicate, size, strided):
    x, scale, bias, mask = draw(Case((16, 3), size, mask="bool"))
    parts = make_parts(16, size, strided)
    dy, *of_seen = map(np.float32, cotangents(parts.number, x.shape, scale.shape))

    def f(x, scale, bias, mask):
        y, seen = ghost_batch_norm(
            x, scale, bias, group_size=size, strided=strided,
            mask=mask, epsilon=0.1, axis_name="batch",
        )  # fmt: skip
        return y, *seen

    def loss(x, scale, bias, mask):
        copies = (jnp.repeat(v[None], DEVICES, axis=0) for v in (scale, bias))
        x, mask = (v.reshape(DEVICES, -1, v.shape[-1]) for v in (x, mask))
        y, *seen = replicate(f)(x, *copies, mask)
        y = y.reshape(16, 3)
        # Every device has the Moments of all groups: their mean over the devices.
        averages = (jnp.mean(v, 0) for v in seen[:2])
        return sum(map(jnp.vdot, (dy, *of_seen), (y, *averages))), (y, seen)

    f_and_gradients = jax.jit(jax.grad(loss, range(3), has_aux=True))
    gradients, (y, seen) = f_and_gradients(*map(np.float32, (x, scale, bias, mask)))
    want, back = expected(x, scale, bias, mask, -1, parts)
    assert_close(gradients, back, 1e-4)
    for i in range(DEVICES):
        assert_close((y, *(v[i] for v in seen)), want, 1e-5)


@pytest.mark.parametrize(("group_size", "strided"), [(2, True), (12, False)])
def test_jit_with_sharding(make_mesh, group_size, strided):
    x, scale, bias, _ = draw(Case((16, 3), 0))
    f = functools.partial(ghost_batch_norm, group_size=group_size, strided=strided, epsilon=0.1)
    placed = jax.device_put(np.float32(x), NamedSharding(make_mesh(batch=4), P("batch")))
    y, seen = jax.jit(f)(placed, scale, bias)
    want, _ = expected(x, scale, bias, None, -1, make_parts(16, group_size, strided))
    assert_close((y, *seen), want, 1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((6, 3), {"group_size": 0}, "group_size=0"),
        ((6, 3), {"group_size": -2}, "group_size=-2"),
        ((6, 3), {"group_size": 1}, r"one element per feature.*\(1, 3\)"),
        ((5, 3), {"group_size": 2}, "one element per feature"),
        ((3, 3), {"group_size": 2, "strided": True}, "one element per feature"),
        ((0, 3), {"group_size": 2}, r"no elements .*\(0, 3\)"),
        ((6, 3), {"group_size": 2, "axis": (0, 1)}, r"axis=\(0, 1\)"),
        ((6, 3), {"group_size": 2, "axis_index_groups": [[0]]}, "axis_index_groups"),
        ((6, 3), {"group_size": 2, "mask": np.ones(6)}, r"mask of shape \(6,\)"),
        ((6, 3), {"group_size": 2, "scale": np.ones(2)}, r"scale of shape \(2,\)"),
    ],
)
def test_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        ghost_batch_norm(jnp.ones(shape), **options)


@pytest.mark.parametrize(
    ("group_size", "strided", "message"),
    [
        (3, False, "groups of 3 do not fit 4 devices of 4 .* of, 4"),
        (6, False, "groups of 6 do not fit 4 devices of 4"),
        (6, True, "strided groups of 6 do not fit 4 devices of 4 .* 16 over"),
        (2, True, "strided groups of 2 do not fit 4 devices of 4 .* divide 4"),
        (1, False, "one element per feature"),
    ],
)
def test_groups_that_do_not_fit_the_devices(group_size, strided, message):
    f = functools.partial(
        ghost_batch_norm, group_size=group_size, strided=strided, axis_name="batch"
    )
    with pytest.raises(ValueError, match=message):
        jax.vmap(f, axis_name="batch")(jnp.ones((4, 4, 3)))


def test_a_group_of_one_beside_groups_of_two_devices():
    f = functools.partial(ghost_batch_norm, group_size=2, axis_name="batch")
    with pytest.raises(ValueError, match="one element per feature"):
        jax.vmap(f, axis_name="batch")(jnp.ones((5, 1, 3)))


def test_groups_of_one_that_are_allowed():
    x, bias = jnp.arange(15.0).reshape(5, 3), jnp.float32([1, 2, 3])
    y, seen = ghost_batch_norm(x, bias=bias, group_size=2, allow_single=True)
    np.testing.assert_array_equal(y[4], bias)
    np.testing.assert_array_equal(seen.count, [2, 2, 1])
