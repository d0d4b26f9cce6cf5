"""Gradient accumulation: one step's gradient and running statistics from micro-batches.

A batch that does not fit into memory goes through the network in parts. BatchNorm makes a
choice of it: normalised by its own statistics a micro-batch is a small batch (`accumulate`,
what everyone does), by those of all micro-batches together it is a part of the big one
(`accumulate_exactly`, which passes over the network more often).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bn_jax.core.arrays import abs2
from bn_jax.core.moments import Moments
from bn_jax.surgery.calls import GHOSTS, RENORMS, BatchNorms
from bn_jax.surgery.intercept import Model, known
from bn_jax.surgery.micro_batches import forward, named, scan, zeros
from bn_jax.surgery.observe import Inputs, merged, used
from bn_jax.surgery.tree import join, like, split

Loss = Callable[[Any, Any], Any]


def accumulate(
    model: Model,
    variables: Any,
    loss: Loss,
    micro_batches: tuple[Any, Any],
    *,
    has_aux: bool = False,
    batch_norms: BatchNorms | None = None,
    **call: Any,
) -> tuple[Any, Any, Any]:
    """Value, gradients and variables of a step whose micro-batches are batches by themselves.

        value, gradients = mean over micro-batches of loss(output, targets), and its gradient

    Every BatchNorm normalises a micro-batch by its statistics. The running statistics move
    once, by the layer's own rule, with the Moments of all micro-batches together (of a layer
    that is called several times, once for each call, as on one batch). A GhostBatchNorm
    moves with one group after another, as always; where the groups, not strided, divide the
    micro-batch it does what it does on the big batch. To be jitted, in a train step:

        value, gradients, variables = accumulate(model, variables, loss, batches, train=True)
        updates, opt_state = optimizer.update(gradients, opt_state, variables["params"])

    Micro-batches count alike. Where examples are masked, give them weights among the targets
    whose mean over all micro-batches is 1, and let the loss be the mean of the weighted. The
    running statistics count what the mask counts.

    Args:
      model, variables: see `bn_jax.surgery`.
      loss: (output, targets) to the mean over the examples of a micro-batch, `[]`.
      micro_batches: (inputs, targets) with a first axis of micro-batches. Inputs are an
        array, or the tuple of the model's positional arguments, a mask among them.
      has_aux: whether the loss returns (value, aux), as in `jax.value_and_grad`.
      batch_norms: further classes of BatchNorms; see `Adapter`.
      **call: what the model is called with besides, alike for all micro-batches; but each
        has keys of its own from Linen's `rngs`, by `jax.random.fold_in` of its number.
        (NNX has its streams in the variables, where they move on.)

    Returns:
      The mean loss, or with `has_aux` that and aux of all micro-batches, along a new first
      axis; its gradients, of the structure of `params` (NNX: State of nnx.Param); and the
      variables, of which the parameters are as they were.

    Raises:
      ValueError: a BatchNorm of a class that is not known, or within a scan or vmap that its
        Moments do not come out of; or micro-batches of different numbers.
    """
    micro_batches = (Inputs.of(micro_batches[0]), micro_batches[1])
    forward, params, state = _split(model, variables, micro_batches[0], batch_norms, call)

    def one(state, number, inputs, targets):
        def value(params):
            output, seen, after = forward.moving(params, state, number, inputs)
            value, aux = loss(output, targets) if has_aux else (loss(output, targets), ())
            return value, (aux, seen, after)

        (value, (aux, seen, after)), gradients = jax.value_and_grad(value, has_aux=True)(params)
        return gradients, (value, aux, seen), after

    total, (values, aux, seen), state = scan(one, zeros(params), state, micro_batches)
    batches = [(path, merged(seen[number, path])) for number, path in sorted(seen)]
    state = forward.moved(params, state, batches)
    return _results(values, aux, has_aux, total, variables, params, state)


def accumulate_exactly(
    model: Model,
    variables: Any,
    loss: Loss,
    micro_batches: tuple[Any, Any],
    *,
    has_aux: bool = False,
    batch_norms: BatchNorms | None = None,
    **call: Any,
) -> tuple[Any, Any, Any]:
    """Value, gradients and variables of the step on all micro-batches as one batch.

    The activations of one micro-batch are in memory at a time. With s_k the Moments, over
    all micro-batches, of what the k-th of K calls of BatchNorms normalises:

        forwards    for k = 1 .. K: s_k, where the calls before it normalise by s_1 .. s_k-1
        gradient    of the mean loss in (params, s_1 .. s_K), all of them arguments
        backwards   for k = K .. 1: with (a, b) what was added up for (mean_k, var_k), add the
                    gradient in (params, s_1 .. s_k-1) of

                    sum_i w_i/n (a x_i + b |x_i - mean_k|^2),    a, b, mean_k constants

    x being the input of the call (the mean square about any constant has at the mean no
    derivative by it, which makes that the chain rule). Every k takes one pass forwards and
    another one both ways through the network up to the call.

    Arguments and results are those of `accumulate`. A micro-batch may be of one example;
    what is masked must be finite.

    Raises:
      ValueError: as `accumulate`; a GhostBatchNorm or BatchRenorm; a layer within a scan or
        vmap, or with an axis_name that is bound.
    """
    micro_batches = (Inputs.of(micro_batches[0]), micro_batches[1])
    forward, params, state = _split(model, variables, micro_batches[0], batch_norms, call)
    calls = forward.calls(params, state, micro_batches)
    _refuse([call for call, _ in calls], forward.axes)
    stats: list[Moments] = []
    for _ in calls:
        stats.append(_next_moments(forward, params, state, stats, micro_batches))
    loss = loss if has_aux else _without_aux(loss)
    sums, (values, aux), after = _gradient(forward, loss, params, state, stats, micro_batches)
    for k in reversed(range(len(calls))):
        total, (*adjoints, mine) = sums
        link = functools.partial(_link, stats[k], mine)
        sums = total, adjoints
        sums = _through_moments(forward, link, params, state, stats[:k], sums, micro_batches)
    seen = zip(calls, stats, strict=True)
    state = forward.moved(params, after, [(c.path, s) for (c, moves), s in seen if moves])
    return _results(values, aux, has_aux, sums[0], variables, params, state)


def _split(model, variables, inputs, batch_norms, call):
    """The model as a function, its parameters, and its other variables."""
    norms = known(batch_norms)
    first = jax.tree.map(lambda v: v[0], inputs)
    axes = used(model, variables, *first.args, norms=norms, **call).axes
    return forward(model, variables, norms, axes, call), *split(variables)


def _results(values, aux, has_aux, total, variables, params, state):
    value = (values.mean(), aux) if has_aux else values.mean()
    gradients = jax.tree.map(lambda t, p: (t / len(values)).astype(p.dtype), total, params)
    return value, gradients, like(variables, join(params, state))


def _without_aux(loss):
    return lambda output, targets: (loss(output, targets), ())


def _next_moments(forward, params, state, stats, micro_batches):
    """Of the first call that is without statistics, over all micro-batches."""

    def one(state, number, inputs, _):
        _, moments, after = forward.normalized_by(params, state, number, inputs, stats)
        return (), moments, after

    return merged(scan(one, (), state, micro_batches)[1])


def _gradient(forward, loss, params, state, stats, micro_batches):
    """The sum of the loss's gradients in (params, stats), the losses, and the state after."""

    def one(state, number, inputs, targets):
        def value(params, stats):
            output, _, after = forward.normalized_by(params, state, number, inputs, stats)
            value, aux = loss(output, targets)
            return value, (aux, after)

        of = jax.value_and_grad(value, (0, 1), has_aux=True)
        (value, (aux, after)), gradients = of(params, stats)
        return gradients, (value, aux), after

    return scan(one, zeros((params, stats)), state, micro_batches)


def _through_moments(forward, link, params, state, stats, sums, micro_batches):
    """The sums, with the gradients in (params, stats) of link(the next call's Moments)."""

    def one(state, number, inputs, _):
        def value(params, stats):
            _, moments, after = forward.normalized_by(params, state, number, inputs, stats)
            return link(moments), after

        gradients, after = jax.grad(value, (0, 1), has_aux=True)(params, stats)
        return gradients, (), after

    return scan(one, sums, state, micro_batches)[0]


def _link(whole, adjoint, part):
    """What a part adds to the whole's mean and variance, times their adjoints."""
    share = part.count / jnp.where(whole.count != 0, whole.count, 1)
    square = part.var + abs2(part.mean - whole.mean)
    return jnp.sum(share * (adjoint.mean * part.mean + adjoint.var * square).real)


def _refuse(calls, unbound):
    for call in calls:
        if isinstance(call.layer, (*GHOSTS, *RENORMS)) or call.swapped in ("ghost", "renorm"):
            raise ValueError(
                f"{named(call)} normalises by more, or less, than the batch: use accumulate"
            )
        axis_name = getattr(call.layer, "axis_name", None)
        if axis_name is not None and axis_name not in unbound:
            raise ValueError(
                f"{named(call)} has axis_name={axis_name!r}: shard the examples "
                "under jit, without it"
            )
