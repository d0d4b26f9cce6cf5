"""A model over micro-batches: its BatchNorms' calls, and sums over a scan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax import lax
from jax.extend.core import get_opaque_trace_state

from bn_jax.core.arrays import accumulation_dtype
from bn_jax.core.moments import Moments, merge
from bn_jax.surgery.intercept import (
    GHOSTS,
    Call,
    Hook,
    Linen,
    Model,
    Path,
    apply_and_update,
    attributes,
    intercept,
    spelled,
)
from bn_jax.surgery.tree import flat, get_stats, join


class Forward(NamedTuple):
    """The model as a function of its parameters, its other variables (`state`) and a batch.

    Attributes:
      model: see `bn_jax.surgery`.
      call: what it is called with beside the inputs.
    """

    model: Model
    call: dict[str, Any]

    def __call__(
        self, params: Any, state: Any, number: Any, inputs: Any, stats: Sequence[Moments] | None
    ) -> tuple[Any, list[Call], Any]:
        """The output on micro-batch `number`, the calls of BatchNorms in training, the state.

        The calls normalise by `stats`, those that are left by running statistics; or, where
        `stats` is None, as they do by themselves. Running statistics stay as they were.
        """
        calls: list[Call] = []
        outside = get_opaque_trace_state()

        def hook(call):
            if call.use_running_average:
                if stats is not None and call.path in {c.path for c in calls}:
                    raise ValueError(
                        f"{named(call)} is called in training and then with its running "
                        "statistics, which in between are not those of the whole batch"
                    )
                return call.proceed()
            if get_opaque_trace_state() != outside:
                raise ValueError(
                    f"{named(call)} is called within a transformation (remat, scan, jit), out "
                    "of which its statistics do not come: transform the step instead"
                )
            calls.append(call)
            if stats is None:
                return call.proceed()
            mine = stats[len(calls) - 1 : len(calls)]
            return _proceed_with(call, *mine) if mine else call.proceed(True)

        output, after = self.apply(params, state, number, inputs, hook)
        kept = {call.path for call in calls if not isinstance(call.layer, GHOSTS)}
        return output, calls, _with_stats_of(state, after, kept)

    def apply(self, params: Any, state: Any, number: Any, inputs: Any, hook: Hook):
        """The output, and the state after it, of the model with a hook."""
        variables = join(params, state)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        hooked, call = intercept(self.model, variables, hook), self.call
        if isinstance(hooked, Linen):
            keys = call.get("rngs")
            rngs = jax.tree.map(lambda key: jax.random.fold_in(key, number), keys)
            call = {**call, "rngs": rngs}
        return apply_and_update(hooked, variables, *inputs, **call)

    def calls(self, params: Any, state: Any, micro_batches: Any) -> list[tuple[Call, bool]]:
        """Every call of a BatchNorm in training, and whether it moves running statistics.

        A call is of use for its path and the settings of its layer, not for its input.
        """
        found: list[tuple[Call, bool]] = []

        def trace(params, state, inputs):
            calls: list[Call] = []

            def hook(call):
                calls.extend([] if call.use_running_average else [call])
                with _allowing_single(call.layer):
                    return call.proceed()

            _, after = self.apply(params, state, 0, inputs, hook)
            found.extend((call, _moves(call, state, after)) for call in calls)

        first = jax.tree.map(lambda v: v[0], micro_batches[0])
        jax.eval_shape(trace, params, state, first)
        return found


def scan(one: Callable[..., Any], sums: Any, state: Any, micro_batches: tuple[Any, Any]) -> Any:
    """One micro-batch after another: (the sums, all that is seen, the last state).

    Args:
      one: (state, number, inputs, targets) to (terms of the sums, what is seen, the state).
      sums, state: before the first.
      micro_batches: (inputs, targets), of a first axis of micro-batches.
    """
    inputs, targets = micro_batches
    numbers = jnp.arange(len(jax.tree.leaves(inputs)[0]))

    def body(carry, micro_batch):
        sums, state = carry
        terms, seen, state = one(state, *micro_batch)
        return (jax.tree.map(jnp.add, sums, terms), state), seen

    (sums, state), seen = lax.scan(body, (sums, state), (numbers, inputs, targets))
    return sums, seen, state


def zeros(tree: Any) -> Any:
    """To add to. In half precision a sum would lose what one of many micro-batches adds."""
    return jax.tree.map(lambda v: jnp.zeros(jnp.shape(v), accumulation_dtype(v)), tree)


def merged(moments: Moments) -> Moments:
    """Moments along a first axis as one."""
    first, others = (jax.tree.map(lambda v, s=s: v[s], moments) for s in (0, slice(1, None)))
    return lax.scan(lambda a, b: (merge(a, b), None), first, others)[0]


def named(call: Call) -> str:
    """A layer in an error message."""
    return f"{type(call.layer).__name__} {spelled(call.path)}"


def _proceed_with(call, stats):
    """What the layer returns with these in place of its running statistics."""
    new = {"mean": stats.mean, "var": stats.var}
    if isinstance(call.layer, nnx.Module):
        with attributes(call.layer, **{name: nnx.BatchStat(v) for name, v in new.items()}):
            return call.proceed(True)
    for name, v in new.items():
        call.layer.put_variable("batch_stats", name, v)
    return call.proceed(True)


def _allowing_single(layer):
    if hasattr(layer, "allow_single"):
        return attributes(layer, allow_single=True)
    return contextlib.nullcontext()


def _moves(call, before, after):
    """Not where the very array comes back: `update_stats=False`, or a layer that is frozen."""
    path = call.path
    return get_stats(after, path)["mean"] is not get_stats(before, path)["mean"]


def _with_stats_of(before: Any, after: Any, paths: Collection[Path]) -> Any:
    """The variables in `before` as they are after, but not the statistics of these layers."""
    kept = {p: v for p, v in flat(before, nnx.BatchStat).items() if p[:-1] in paths}
    if isinstance(before, nnx.State):
        new = dict(nnx.to_flat_state(after)) | kept
        return nnx.from_flat_state((p, new[p]) for p, _ in nnx.to_flat_state(before))
    if not kept:
        return after
    new = traverse_util.flatten_dict(after["batch_stats"]) | kept
    return {**after, "batch_stats": traverse_util.unflatten_dict(new)}
