"""What a model's layers do with a batch: one run of the model, watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.core.arrays import Axes, abs2, split_axes, weigh, weights, widen
from bn_jax.core.moments import Moments, merge, moments
from bn_jax.surgery.calls import Adapter, Call, Path, left_alone, spelled
from bn_jax.surgery.compare import array_leaves
from bn_jax.surgery.diagnose.modes import Mode, proceed_alone
from bn_jax.surgery.intercept import SOWN, intercept
from bn_jax.surgery.observe import Inputs, merged, per_step
from bn_jax.surgery.sown import coming_out, sow, sown
from bn_jax.surgery.tree import layer_leaves
from bn_jax.xla import run_once


class Seen(NamedTuple):
    """The moments of what a layer is given, and what they owe to the choice of examples.

    Attributes:
      moments: of all elements.
      noise: squared standard errors of `moments.mean` and of `moments.var`, from how far
        the examples differ; the elements of one example need not be independent.
    """

    moments: Moments
    noise: tuple[jax.Array, jax.Array]


class Norm(NamedTuple):
    """A BatchNorm in a run.

    Attributes:
      path: in the variables.
      layer: its settings.
      leaves: mean, var and count, scale and bias.
      seen: all that it was given.
      elements: the fewest in one call of any feature that had any.
      dtype: of its input.
      training: whether it normalised by the batch.
      adapter: how the layer is read.
    """

    path: Path
    layer: Any
    leaves: dict[str, jax.Array]
    seen: Seen
    elements: float
    dtype: jnp.dtype
    training: bool
    adapter: Adapter = Adapter()

    def like(self, other: Norm) -> Norm:
        """It with the fewest elements of both, in training if either was."""
        return self._replace(
            elements=min(self.elements, other.elements),
            training=self.training or other.training,
        )

    @property
    def epsilon(self) -> Any:
        """What the layer adds to the variance."""
        return self.adapter.read(self.layer, "epsilon")

    @property
    def at_start(self) -> jax.Array:
        """Of each feature, whether its statistics are those that a layer starts from."""
        return (self.leaves["mean"] == 0) & (self.leaves["var"] == 1)


class Watched(NamedTuple):
    """One run of a model.

    Attributes:
      output: the arrays that the model returns.
      norms: the BatchNorms in the order of their first calls.
      breaks: the first module whose output is not finite though its inputs are, or None.
      strangers: the classes of layers with running statistics that are not known.
    """

    output: Any
    norms: dict[Path, Norm]
    breaks: Path | None
    strangers: dict[Path, type]


def compiled(function: Callable) -> Callable:
    """To be run a few times, which takes less than compiling it."""
    return jax.jit(function, compiler_options=run_once())


def watch(mode: Mode, variables: Any, inputs: tuple) -> Watched:
    """One run of the model, all layers seen.

    Raises:
      ValueError: a BatchNorm that is called within `nn.scan`, `nn.vmap` or the like.
    """
    unseen: dict[Path, Norm] = {}
    modules: dict[Path, None] = {}
    strangers: dict[Path, type] = {}
    leaves = layer_leaves(mode.model, variables)

    def hook(call: Call):
        if call.adapter is None:
            y = call.proceed()
        else:
            norm = _unseen(call, leaves[call.path])
            unseen[call.path] = norm.like(unseen.get(call.path, norm))
            found = measure(call.x, call.kwargs.get("mask"), _static(call.axis))
            sow(call.layer, "seen", (found, _fewest(found)), _both)
            y = proceed_alone(call)
        modules[call.path] = None
        breaks = finite((call.args, call.kwargs)) & ~finite(y)
        sow(call.layer, "breaks", breaks, jnp.logical_or)
        return y

    every = (nn.Module, nnx.Module)
    watched = intercept(mode.model, variables, hook, mode.norms, every, strangers.__setitem__)

    @compiled
    def function(variables, inputs):
        output, after = mode.run(watched, variables, *inputs.args, **mode.call)
        seen, breaks = sown(after, "seen"), sown(after, "breaks")
        return array_leaves(output), list(map(seen.get, unseen)), list(map(breaks.get, modules))

    with coming_out():
        output, seen, breaks = function(variables, Inputs(mode.of(inputs)))
    pairs = zip(unseen.items(), seen, strict=True)
    norms = {path: _given(norm, s) for (path, norm), s in pairs}
    broken = (p for p, b in zip(modules, breaks, strict=True) if b is not None and b.any())
    return Watched(output, norms, next(broken, None), strangers)


def joined(a: Norm | None, b: Norm) -> Norm:
    """One layer of two calls."""
    if a is None:
        return b
    return b.like(a)._replace(seen=_merged(a.seen, b.seen))


def finite(tree: Any) -> jax.Array:
    """Whether all floating-point numbers of a tree are."""
    arrays = [v for v in jax.tree.leaves(tree) if hasattr(v, "dtype")]
    floats = [v for v in arrays if jnp.issubdtype(v.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(v).all() for v in floats], bool).all()


def run_with(mode: Mode, inference: Collection[Path]) -> Callable[[Any, tuple], Any]:
    """From variables and inputs to the arrays that the model returns.

    Args:
      mode: of the model.
      inference: the layers that use their running statistics, whatever the mode says.
    """

    def hook(call):
        return proceed_alone(call, True if call.path in inference else None)

    @compiled
    def function(variables, inputs):
        model = intercept(mode.model, variables, hook, mode.norms, stranger=left_alone)
        return array_leaves(mode.run(model, variables, *inputs.args, **mode.call)[0])

    return lambda variables, inputs: function(variables, Inputs(mode.of(inputs)))


def _unseen(call, leaves):
    """Of the elements the share that the layer normalises over at once."""
    share, layer = 1.0, call.layer
    if hasattr(layer, "group_size"):
        examples = call.x.shape[split_axes(call.x.shape, call.axis)[1][0]]
        share = min(layer.group_size, examples) / examples
    leaves, training = call.adapted.ours(leaves), not call.use_running_average
    # What it was given is known when the run has ended.
    given: Any = None
    dtype = call.x.dtype
    return Norm(call.path, layer, leaves, given, share, dtype, training, call.adapted)


def _fewest(seen):
    """The fewest elements of a feature that has any; inf of none."""
    count = seen.moments.count
    return jnp.min(jnp.where(count != 0, count, jnp.inf))


def _both(a, b):
    return _merged(a[0], b[0]), jnp.minimum(a[1], b[1])


def _given(norm, left):
    if left is None:
        raise ValueError(
            f"{spelled(norm.path)} is within a scan or a vmap, which nothing comes out of: say "
            f"variable_axes={{{SOWN!r}: 0}} to nn.scan or nn.vmap, or diagnose without it"
        )
    seen, fewest = left
    fewest = float(jnp.min(fewest))
    seen = seen._replace(moments=per_step(seen.moments))
    while seen.moments.mean.ndim > norm.leaves["mean"].ndim:  # steps that share statistics
        seen = merged(seen, _merged)
    return norm._replace(
        seen=seen,
        elements=norm.elements * (0.0 if fewest == math.inf else fewest),
    )


def _static(axis):
    return axis if isinstance(axis, int) else tuple(axis)


def measure(x: jax.Array, mask: jax.Array | None, axis: Axes) -> Seen:
    """What one call of a layer is given; examples lie along the first axis that is reduced.

    With d = x - mean and e = |d|^2 - var, n = sum w over all elements and N examples i,

        noise = N/(N-1) sum_i |sum w d|^2 / n^2,    the same of e

    the cluster-robust variance of a mean (Liang & Zeger 1986); inf of one example.
    """
    batch = moments(x, axis=axis, mask=mask)
    _, (first, *others) = split_axes(x.shape, axis)
    w = weights(x, mask)
    mean, var = widen(x, axis, mean=batch.mean, var=batch.var)
    d = x - mean
    count = jnp.broadcast_to(jnp.where(batch.count != 0, batch.count, 1), batch.var.shape)
    n = x.shape[first]

    def error(v):
        if n == 1:
            return jnp.full(count.shape, jnp.inf)
        each = jnp.sum(weigh(v, w), axis=others, keepdims=True)
        squares = jnp.sum(abs2(each), axis=first).reshape(count.shape)
        return n / (n - 1) * squares / count**2

    return Seen(batch, (error(d), error(abs2(d) - var)))


def _merged(a: Seen, b: Seen) -> Seen:
    """Of two calls with other examples: their errors are independent."""
    both = merge(a.moments, b.moments)
    some = jnp.where(both.count != 0, both.count, 1)
    parts = [jnp.broadcast_to(v.moments.count / some, both.var.shape) ** 2 for v in (a, b)]
    noise: list[Any] = [
        sum(part * v for part, v in zip(parts, errors, strict=True))
        for errors in zip(a.noise, b.noise, strict=True)
    ]
    return Seen(both, (noise[0], noise[1]))
