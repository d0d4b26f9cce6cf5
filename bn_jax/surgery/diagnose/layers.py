"""What a model's layers do with a batch: one run of the model, watched."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.core.arrays import Axes, abs2, split_axes, weigh, weights, widen
from bn_jax.core.moments import Moments, merge, moments
from bn_jax.surgery.diagnose.modes import Mode, proceed_alone
from bn_jax.surgery.intercept import BATCH_NORMS, Call, Path, apply, intercept
from bn_jax.surgery.tree import get_leaves
from bn_jax.training.xla import run_once


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
    """

    path: Path
    layer: Any
    leaves: dict[str, jax.Array]
    seen: Seen
    elements: float
    dtype: jnp.dtype
    training: bool

    @property
    def at_start(self) -> jax.Array:
        """Of each feature, whether its statistics are those that a layer starts from."""
        return (self.leaves["mean"] == 0) & (self.leaves["var"] == 1)


class Watched(NamedTuple):
    """One run of a model.

    Attributes:
      output: of the model.
      norms: the BatchNorms in the order of their first calls.
      breaks: the first module whose output is not finite though its inputs are, or None.
    """

    output: Any
    norms: dict[Path, Norm]
    breaks: Path | None


def compiled(function: Callable) -> Callable:
    """To be run a few times, which takes less than compiling it."""
    return jax.jit(function, compiler_options=run_once())


def watch(mode: Mode, variables: Any, inputs: tuple) -> Watched:
    """One run of the model, all layers seen.

    Raises:
      ValueError: a layer that is called within `nn.scan`, `nn.remat` or the like.
    """
    unseen: list[Norm] = []
    modules: list[Path] = []

    @compiled
    def function(traced, inputs):
        seen, breaks = [], []

        def hook(call: Call):
            if isinstance(call.layer, BATCH_NORMS):
                unseen.append(_unseen(call, variables))
                seen.append(measure(call.x, call.kwargs.get("mask"), _static(call.layer.axis)))
                y = proceed_alone(call)
            else:
                y = call.proceed()
            modules.append(call.path)
            breaks.append(finite((call.args, call.kwargs)) & ~finite(y))
            return y

        watched = intercept(mode.model, variables, hook, (nn.Module, nnx.Module))
        return apply(watched, traced, *inputs, **mode.call), seen, breaks

    try:
        output, seen, breaks = function(variables, inputs)
    except jax.errors.UnexpectedTracerError as e:
        raise ValueError(
            "a layer is called within a transformation of the model (nn.scan, nn.remat, jit or "
            "the like): diagnose the model without it"
        ) from e
    norms: dict[Path, Norm] = {}
    for norm, s in zip(unseen, seen, strict=True):
        norms[norm.path] = joined(norms.get(norm.path), _given(norm, s))
    broken = (path for path, b in zip(modules, breaks, strict=True) if b)
    return Watched(output, norms, next(broken, None))


def joined(a: Norm | None, b: Norm) -> Norm:
    """One layer of two calls."""
    if a is None:
        return b
    return b._replace(
        seen=_merged(a.seen, b.seen),
        elements=min(a.elements, b.elements),
        training=a.training or b.training,
    )


def finite(tree: Any) -> jax.Array:
    """Whether all floating-point numbers of a tree are."""
    arrays = [v for v in jax.tree.leaves(tree) if hasattr(v, "dtype")]
    floats = [v for v in arrays if jnp.issubdtype(v.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(v).all() for v in floats], bool).all()


def run_with(mode: Mode, inference: Collection[Path]) -> Callable[[Any, tuple], Any]:
    """From variables and inputs to what the model returns.

    Args:
      mode: of the model.
      inference: the layers that use their running statistics, whatever the mode says.
    """

    def hook(call):
        return proceed_alone(call, True if call.path in inference else None)

    @compiled
    def function(variables, inputs):
        model = intercept(mode.model, variables, hook)
        return apply(model, variables, *inputs, **mode.call)

    return function


def _unseen(call, variables):
    """Of the elements the share that the layer normalises over at once."""
    share, layer = 1.0, call.layer
    if hasattr(layer, "group_size"):
        examples = call.x.shape[split_axes(call.x.shape, layer.axis)[1][0]]
        share = min(layer.group_size, examples) / examples
    leaves = get_leaves(variables, call.path)
    return Norm(
        call.path, layer, leaves, None, share, call.x.dtype, not call.use_running_average
    )


def _given(norm, seen):
    counts = [float(n) for n in seen.moments.count.ravel() if n > 0]
    return norm._replace(seen=seen, elements=norm.elements * min(counts, default=0.0))


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
    count = jnp.broadcast_to(jnp.where(batch.count > 0, batch.count, 1), batch.var.shape)
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
    some = jnp.where(both.count > 0, both.count, 1)
    parts = [jnp.broadcast_to(v.moments.count / some, both.var.shape) ** 2 for v in (a, b)]
    noise = [
        sum(part * v for part, v in zip(parts, errors, strict=True))
        for errors in zip(a.noise, b.noise, strict=True)
    ]
    return Seen(both, tuple(noise))
