"""What the property tests draw: layouts, of which there are few, and recipes for values.

A `Layout` is what a function is compiled for, one of some dozens; a `Recipe` is how to make
the values, of which there are millions, and prints in one line when a property fails.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st


def holds(examples: int, **drawn):
    """`hypothesis.given`, the same examples every time in CI, counted in `.tried`.

    By default a fifth of the examples; all of them with the long tests.
    """

    def decorate(test):
        tried = Counter()

        @functools.wraps(test)
        def counted(**values):
            tried["examples"] += 1
            test(**values)

        ci = "CI" in os.environ
        count = examples if "ALL_EXAMPLES" in os.environ else -(-examples // 5)
        property_test = settings(max_examples=count, deadline=None, derandomize=ci)(
            given(**drawn)(counted)
        )
        property_test.tried = tried
        return property_test

    return decorate


class Layout(NamedTuple):
    """`axis` counts from the end: it means the same on each replica of a first axis."""

    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: str = "float32"
    mask: str | None = None
    scale: bool = True
    bias: bool = True
    relu: bool = False

    @property
    def wide(self) -> np.dtype:
        """The dtype of the statistics."""
        return np.dtype("float64" if self.dtype == "float64" else "float32")

    @property
    def features(self) -> tuple[int, ...]:
        return reference.features(self.shape, self.axis)


DTYPES = ("float32", "bfloat16", "float64", "float16")
MASKS = (None, "bool", "weights", "per feature")
SHAPES = (((48, 3), -1), ((4, 3, 30), -2), ((2, 5, 4, 3), (-4, -1)), ((3, 64), -2))
# A Latin square: every shape meets every mask and every dtype, every mask every dtype.
LAYOUTS = [
    Layout(
        *SHAPES[i],
        DTYPES[(i + j) % 4],
        MASKS[j],
        scale=(i // 2 + j) % 2 == 0,
        bias=(i + j // 2) % 2 == 0,
        relu=(i // 2 + j // 2) % 2 == 1,
    )
    for i in range(4)
    for j in range(4)
]
LARGE = [Layout((4096, 2)), Layout((4096, 2), mask="weights")]
WIDE = [layout for layout in LAYOUTS if layout.dtype == layout.wide.name]
REPLICATED = [
    Layout((8, 6, 3), mask="bool"),
    Layout((8, 6, 3), mask="weights", dtype="float64"),
    Layout((8, 3, 4), axis=-2, mask="per feature"),
    Layout((8, 6, 3), dtype="bfloat16"),
]

# Powers of ten: a sum of 4096 squares stays below float32's 3.4e38, of values that bfloat16
# has moved by 2^-9 of the offset too; float16 ends at 65504.
EXPONENTS = {
    "float16": (-4, 3),
    "bfloat16": (-20, 15),
    "float32": (-20, 17),
    "float64": (-60, 60),
}
VARIED = ("normal", "two values", "heavy tails")
NOISES = (*VARIED, "a constant feature", "constant")


class Recipe(NamedTuple):
    """How to make an input.

    Attributes:
      seed: of everything that has no name here.
      exponent: the largest distance from the mean is 10^exponent.
      offset: |mean| / std, before rounding to the dtype.
      noise: how the values are distributed.
      order: and in which order they come.
      kept: the share of elements that a mask keeps.
      first: whether a mask keeps the first example (replica), if that is reduced.
      padding: what stands where the mask is 0; None for values like the others.
      epsilon: a power of ten.
    """

    seed: int
    exponent: int
    offset: float
    noise: str
    order: str
    kept: float
    first: bool
    padding: str | None
    epsilon: int


@st.composite
def cases(draw, layouts, noises=NOISES, exponents=None):
    """A Layout and a Recipe; the exponents are those that the dtype holds, if not given."""
    layout = draw(st.sampled_from(layouts))
    ends = exponents or EXPONENTS[layout.dtype]
    orders = ["drawn", "sorted", "reversed", "outlier first", "outliers at a stride"]
    recipe = Recipe(
        seed=draw(st.integers(0, 2**32 - 1)),
        exponent=draw(st.integers(*ends) | st.sampled_from(ends)),
        offset=draw(st.sampled_from([0, 0.5, 3, 30, 300, 2e3, 1e4])),
        noise=draw(st.sampled_from(noises)),
        order=draw(st.sampled_from(orders)),
        kept=draw(st.sampled_from([0.7, 1, 0.1, 0])),
        first=draw(st.booleans()),
        padding=draw(st.sampled_from([None, "nan", "inf", "-inf", "largest"])),
        # What float16 is divided by must leave it in its range.
        epsilon=draw(st.integers(-4 if layout.dtype == "float16" else -12, 0)),
    )
    return layout, recipe


class Values(NamedTuple):
    """x as bn_jax gets it, and `clean` as the oracle does: 0 where it is `padded`."""

    axis: int | tuple[int, ...]
    x: np.ndarray
    clean: np.ndarray
    mask: np.ndarray | None
    padded: np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray | None
    epsilon: np.ndarray

    @property
    def elements(self) -> int:
        """Per feature."""
        return self.x.size // math.prod(reference.features(self.x.shape, self.axis))


def make(layout: Layout, recipe: Recipe) -> Values:
    rng = np.random.default_rng(recipe.seed)
    mask = _mask(layout, recipe, rng)
    clean = reference.from_rows(_rows(layout, recipe, rng), layout.shape, layout.axis)
    if layout.dtype == "float16":
        clean = clean * min(1, 6e4 / max(1, np.max(np.abs(clean))))
    clean = clean.astype(jnp.dtype(layout.dtype))
    padded = np.zeros(layout.shape, bool)
    if mask is not None and recipe.padding:
        padded = np.broadcast_to(mask == 0, layout.shape)
    clean[padded] = 0
    x, largest = clean.copy(), float(jnp.finfo(layout.dtype).max)
    x[padded] = largest if recipe.padding == "largest" else float(recipe.padding or 0)
    scale, bias = rng.normal(size=(2, *layout.features)).astype(layout.wide)
    return Values(
        axis=layout.axis,
        x=x,
        clean=clean,
        mask=mask,
        padded=padded,
        scale=scale if layout.scale else None,
        bias=bias if layout.bias else None,
        epsilon=np.asarray(10.0**recipe.epsilon, layout.wide),
    )


def _rows(layout, recipe, rng):
    """`[features, elements]`, in float64."""
    size = reference.to_rows(0, layout.shape, layout.axis).shape
    if recipe.noise == "two values":
        noise = rng.choice([-1.0, 1.0], size)
        noise[:, -1] = -noise[:, 0]
    elif recipe.noise == "heavy tails":
        noise = rng.standard_t(1.5, size)
    else:
        noise = rng.normal(size=size)
    if recipe.order in ("sorted", "reversed"):
        noise = np.sort(noise, axis=1)[:, :: 1 if recipe.order == "sorted" else -1]
    elif recipe.order == "outlier first":
        noise[:, 0] = 1e3
    elif recipe.order == "outliers at a stride":
        # Where a sample of every so many elements would fall.
        noise[:, :: min(256, max(1, size[1] // 16))] += 1e3
    noise -= noise.mean(axis=1, keepdims=True)
    constant = {"constant": slice(None), "a constant feature": 0}.get(recipe.noise, [])
    noise[constant] = 0
    noise /= max(np.max(np.abs(noise)), 1e-3)
    std = np.sqrt(np.mean(noise**2, axis=1, keepdims=True))
    sign = rng.choice([-1, 1], size=std.shape)
    return 10.0**recipe.exponent * (noise + recipe.offset * sign * np.where(std > 0, std, 1))


def _mask(layout, recipe, rng):
    if layout.mask is None:
        return None
    kept = {a % len(layout.shape) for a in np.atleast_1d(layout.axis)}
    narrow = [1 if a in kept else s for a, s in enumerate(layout.shape)]
    shape = layout.shape if layout.mask == "per feature" else narrow
    mask = rng.random(shape) < recipe.kept
    if not recipe.first and 0 not in kept:
        mask[0] = False
    if layout.mask == "bool":
        return mask
    return (mask * rng.choice([0.3, 1, 2.5], shape)).astype(layout.wide)
