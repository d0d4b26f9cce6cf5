"""A model over micro-batches: its BatchNorms' calls, and sums over a scan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax import lax

from bn_jax.core.arrays import accumulation_dtype
from bn_jax.core.layer import updated
from bn_jax.core.moments import Moments
from bn_jax.core.running import BatchStats, each, ema
from bn_jax.surgery.calls import GHOSTS, BatchNorms, Call, Hook, Path, attributes, spelled
from bn_jax.surgery.intercept import SOWN, Model, apply_and_update, intercept
from bn_jax.surgery.observe import (
    Inputs,
    allowing_single,
    binding,
    input_moments,
    numbered,
    on_one_device,
    per_step,
    sow_moments,
    sown_moments,
)
from bn_jax.surgery.sown import coming_out
from bn_jax.surgery.tree import flat, join, layer_places, set_stored, split, value


class Forward(NamedTuple):
    """The model as a function of its parameters, its other variables (`state`) and a batch.

    Attributes:
      model: see `bn_jax.surgery`.
      call: what it is called with beside the inputs.
      norms: classes of BatchNorms.
      places: of the running statistics of each layer.
      axes: names to bind, for one device.
      layers: a call of each layer that `moving` has found to move.
    """

    model: Model
    call: dict[str, Any]
    norms: BatchNorms
    places: dict[Path, dict[str, Path]]
    axes: tuple[str, ...]
    layers: dict[Path, Call]

    def moving(
        self, params: Any, state: Any, number: Any, inputs: Inputs
    ) -> tuple[Any, dict[tuple[int, Path], Moments], Any]:
        """The output on micro-batch `number`, Moments, and the state after it.

        Moments are those of every call that moves running statistics, by the call's number
        and the layer's path. The statistics themselves stay as they were.
        """
        moving: list[Path] = []

        def hook(call):
            ghost = isinstance(call.layer, GHOSTS) or call.swapped == "ghost"
            if ghost or call.path not in self.places:
                return call.proceed()
            before = _mean(call)
            with on_one_device(call.layer, self.axes):
                y = call.proceed()
                # Where the very array is there, it is frozen, or `update_stats=False`.
                if _mean(call) is not before:
                    self.layers[call.path] = call
                    moving.append(call.path)
                    sow_moments(call.layer, input_moments(call))
            return y

        output, after = self._apply(params, state, number, inputs, hook, outermost=True)
        return output, _by_call(moving, after), self._without_stats(state, after, moving)

    def normalized_by(
        self, params: Any, state: Any, number: Any, inputs: Inputs, stats: Sequence[Moments]
    ) -> tuple[Any, Moments | None, Any]:
        """The output where calls in training normalise by `stats`, one after another.

        Those that are left normalise by running statistics. Also the Moments of the first of
        these, if there is one, and the state.
        """
        calls: list[Call] = []

        def hook(call):
            with on_one_device(call.layer, self.axes):
                if call.path not in self.places or call.use_running_average:
                    return call.proceed()
                calls.append(call)
                number = len(calls) - 1
                if number < len(stats):
                    return _proceed_with(call, stats[number])
                if number == len(stats):
                    sow_moments(call.layer, input_moments(call))
                return call.proceed(True)

        output, after = self._apply(params, state, number, inputs, hook)
        next_call = calls[len(stats)] if len(stats) < len(calls) else None
        moments = None if next_call is None else sown_moments(after, next_call.path)[0]
        return output, moments, self._without_stats(state, after, {c.path for c in calls})

    def calls(self, params: Any, state: Any, micro_batches: Any) -> list[tuple[Call, bool]]:
        """Every call of a BatchNorm in training, and whether it moves running statistics.

        A call is of use for its path and the settings of its layer, not for its input.

        Raises:
          ValueError: a layer is within a scan or a vmap.
        """
        found: list[Call] = []
        moving: list[bool] = []
        shapes: list[tuple[int, ...]] = []

        def outer(call):
            if call.path not in self.places:
                return call.proceed()
            before, first = _mean(call), len(found)
            y = call.proceed()
            moving.extend([_mean(call) is not before] * (len(found) - first))
            return y

        def hook(call):
            with on_one_device(call.layer, self.axes), allowing_single(call.layer):
                if call.use_running_average:
                    _refuse_after_training(call, found)
                elif call.path in self.places:
                    found.append(call)
                    moments = input_moments(call)
                    shapes.append(moments.mean.shape)
                    sow_moments(call.layer, moments)
                return call.proceed()

        def trace(params, state, inputs):
            _, after = self._apply(params, state, 0, inputs, hook, watch=outer)
            return {call.path: sown_moments(after, call.path) for call in found}

        first = jax.tree.map(lambda v: v[0], micro_batches[0])
        seen = jax.eval_shape(trace, params, state, first)
        for path, moments in seen.items():
            inside = [s for c, s in zip(found, shapes, strict=True) if c.path == path]
            if [m.mean.shape for m in moments] != inside:
                raise ValueError(
                    f"{spelled(path)} is within a scan or vmap, whose steps are no calls by "
                    "themselves: use accumulate"
                )
        self.layers.update({call.path: call for call in found})
        return list(zip(found, moving, strict=True))

    def moved(self, params: Any, state: Any, batches: Iterable[tuple[Path, Moments]]) -> Any:
        """The state after an update of running statistics for each of the Moments, in order."""
        variables = join(params, state)
        stored = {p: value(v) for p, v in flat(variables, nnx.BatchStat).items()}
        for path, batch in batches:
            call = self.layers[path]
            names = call.adapted.ours(self.places[path])
            before = {name: stored[at] for name, at in names.items()}
            stats = _update(call, BatchStats(**{"count": jnp.int32(0)} | before), batch)
            stored |= {at: getattr(stats, name) for name, at in names.items()}
        return split(set_stored(variables, stored))[1]

    def _apply(self, params, state, number, inputs, hook: Hook, watch=None, outermost=False):
        """The output, and the state after it, of the model with a hook."""
        variables = join(params, state)
        hooked = intercept(self.model, variables, hook, self.norms, outermost=outermost)
        if watch is not None:
            hooked = intercept(hooked, variables, watch, self.norms, outermost=True)
        call = numbered(self.model, self.call, number)
        run = binding(self.axes, lambda v, x: apply_and_update(hooked, v, *x.args, **call))
        with coming_out():
            return run(variables, inputs)

    def _without_stats(self, before: Any, after: Any, paths: Collection[Path]) -> Any:
        """The variables in `before` as they are after, but not the statistics of `paths`."""
        norms = [self.places[path] for path in paths]
        places = {place for names in norms for place in names.values()}
        kept = {p: v for p, v in flat(before, nnx.BatchStat).items() if p in places}
        if isinstance(before, nnx.State):
            new = dict(nnx.to_flat_state(after)) | kept
            return nnx.from_flat_state((p, new[p]) for p, _ in nnx.to_flat_state(before))
        new = {name: v for name, v in after.items() if name != SOWN}
        if kept:
            stats = traverse_util.flatten_dict(after["batch_stats"]) | kept
            new["batch_stats"] = traverse_util.unflatten_dict(stats)
        return new


def forward(
    model: Model, variables: Any, norms: BatchNorms, axes: tuple[str, ...], call: dict[str, Any]
) -> Forward:
    """The model as a `Forward`."""
    return Forward(model, call, norms, layer_places(model, variables, nnx.BatchStat), axes, {})


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


def named(call: Call) -> str:
    """A layer in an error message."""
    return f"{type(call.layer).__name__} {spelled(call.path)}"


def _by_call(paths, after):
    """What was left at layers, by the calls in their order: of those traced anew the last."""
    calls = {path: [i for i, p in enumerate(paths) if p == path] for path in paths}
    left = {path: sown_moments(after, path) for path in calls}
    return {
        (i, path): per_step(m)
        for path, moments in left.items()
        for i, m in zip(calls[path][-len(moments) :], moments, strict=True)
    }


def _mean(call):
    """The running mean as it is now."""
    name = call.adapter.mean
    if isinstance(call.layer, nnx.Module):
        return value(getattr(call.layer, name))
    return value(call.layer.get_variable("batch_stats", name))


def _update(call, stats, batch):
    if hasattr(call.layer, "estimator"):
        return updated(call.layer, stats, batch)
    estimator = functools.partial(ema, momentum=call.momentum)
    batch = lax.stop_gradient(batch)
    steps = batch.mean.ndim > stats.mean.ndim
    return each(estimator, stats, batch) if steps else estimator(stats, batch)


def _refuse_after_training(call, calls):
    if call.path in {c.path for c in calls}:
        raise ValueError(
            f"{named(call)} is called in training and then with its running "
            "statistics, which in between are not those of the whole batch"
        )


def _proceed_with(call, stats):
    """What the layer returns with these in place of its running statistics."""
    new = call.adapted.theirs({"mean": stats.mean, "var": stats.var})
    if isinstance(call.layer, nnx.Module):
        with attributes(call.layer, **{name: nnx.BatchStat(v) for name, v in new.items()}):
            return call.proceed(True)
    for name, v in new.items():
        call.layer.put_variable("batch_stats", name, v)
    return call.proceed(True)
