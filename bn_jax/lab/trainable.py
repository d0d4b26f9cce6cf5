"""Anybody's model, Linen or NNX, as two pure functions that the laboratory can train.

    variables = trainable.init(key, inputs)
    outputs, variables = trainable.apply(variables, inputs, train=True, key=key)

`variables` are nested dicts of arrays: `params`, `batch_stats` if there are any, and what else
the model keeps. `bn_jax.lab.foreign` makes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from bn_jax.surgery import swap
from bn_jax.surgery.observe import binding
from bn_jax.surgery.tree import value

KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
Make = Callable[[nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A model and how it is called.

    Attributes:
      name: as the user wrote it.
      how: how the model is told the mode: `argument`, `field`, `train() and eval()`, or "" of
        one that is the same in both.
      modes: names that say it, and what they are in training.
      streams: of random numbers that it wants beside `params`.
      axes: names of axes that its BatchNorms share statistics over; one device's where nobody
        has bound them.
      same_start: whether all seeds start from the same weights.
    """

    name: str
    how: str
    modes: Mapping[str, bool]
    streams: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    same_start: bool = False

    def describe(self) -> str:
        """Returns one line about all of it."""
        api = "NNX" if isinstance(self, OfNnx) else "Linen"
        how = (
            f"{self.how} {', '.join(self.modes)}".strip() or "alike in training and evaluation"
        )
        streams = ", ".join(self.streams) or "none"
        parts = [f"{self.name}: {api}", f"mode: {how}", f"random numbers: {streams}"]
        parts += [f"axes of one device: {', '.join(self.axes)}"] if self.axes else []
        parts += ["all seeds start from the same weights"] if self.same_start else []
        return "; ".join(parts)

    def init(self, key: jax.Array, inputs: jax.Array) -> dict[str, Any]:
        """Returns the variables at the start; inputs `[n, ...]`."""
        raise NotImplementedError

    def apply(
        self,
        variables: Mapping[str, Any],
        inputs: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Returns what the model does, and its variables after the call.

        Args:
          variables: as `init` returns them.
          inputs: `[n, ...]`.
          train: the mode.
          key: of all its random numbers; in evaluation there may be none.
        """
        raise NotImplementedError

    def swapped(self, norm: Any, **options: Any) -> Trainable:
        """Returns the model with another norm in its BatchNorms' place, by `surgery.swap`."""
        raise NotImplementedError

    def told(self, train: bool) -> dict[str, bool]:
        """The mode as keyword arguments of the model's call."""
        if self.how != "argument":
            return {}
        return {name: training == train for name, training in self.modes.items()}

    def module(self) -> Adapted:
        """The model as one of the laboratory's own networks is called."""
        return Adapted(self)

    def _bound(self, function):
        """The function of two arguments, with those of the axes that nobody has bound."""
        return binding([name for name in self.axes if not _is_bound(name)], function)


@dataclasses.dataclass(frozen=True)
class OfLinen(Trainable):
    """A Linen model; `models` are those of evaluation and of training."""

    models: tuple[Any, Any] = (None, None)

    def init(self, key, inputs):
        """See `Trainable`."""
        call = self.told(False)
        run = self._bound(lambda key, x: self.models[False].init(key, x, **call))
        return dict(run(key, inputs))

    def apply(self, variables, inputs, *, train, key=None):
        """See `Trainable`."""
        call = self.told(train)
        key = jax.random.key(0) if key is None else key
        rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(self.streams)}
        # Some models take mutable statistics for the word to train.
        kept = ("params",) if train else ("params", "batch_stats")
        mutable = [name for name in variables if name not in kept]

        def run(variables, x):
            return self.models[train].apply(variables, x, rngs=rngs, mutable=mutable, **call)

        outputs, after = self._bound(run)(variables, inputs)
        return outputs, {**variables, **after}

    def swapped(self, norm, **options):
        """See `Trainable`."""
        models = tuple(swap(model, norm, **options) for model in self.models)
        return dataclasses.replace(self, models=models)


@dataclasses.dataclass(frozen=True)
class OfNnx(Trainable):
    """An NNX model, made anew from a key; `graphdefs` and `state` are of evaluation, training.

    Attributes:
      make: from streams of random numbers to the module.
      graphdefs: of evaluation and of training.
      state: its Variables without values.
    """

    make: Make = nnx.Module  # type: ignore[reportAssignmentType]
    graphdefs: tuple[Any, Any] = (None, None)
    state: Any = None

    def init(self, key, inputs):
        """See `Trainable`."""
        return self._plain(nnx.state(self.make(nnx.Rngs(key))))

    def apply(self, variables, inputs, *, train, key=None):
        """See `Trainable`."""
        call = self.told(train)
        key = jax.random.key(0) if key is None else key

        def run(variables, x):
            module = nnx.merge(self.graphdefs[train], self._state(variables, key))
            return module(x, **call), self._plain(nnx.state(module))

        return self._bound(run)(variables, inputs)

    def swapped(self, norm, **options):
        """See `Trainable`."""
        made = functools.partial(_swapped, self.make, norm, tuple(options.items()))
        return dataclasses.replace(self, make=made, **of_graph(made))

    def _plain(self, state):
        """Nested dicts of arrays, without what is sown, and streams, which come from a key."""
        found: dict[str, dict[Any, Any]] = {}
        for path, v in nnx.to_flat_state(state):
            if not isinstance(v, nnx.RngState | nnx.Intermediate):
                kind = next((k for k, of in KINDS.items() if isinstance(v, of)), "others")
                found.setdefault(kind, {})[path] = value(v)
        return {kind: traverse_util.unflatten_dict(v) for kind, v in found.items()}

    def _state(self, variables, key):
        values = {}
        for tree in variables.values():
            values |= traverse_util.flatten_dict(tree)
        for i, (path, v) in enumerate(nnx.to_flat_state(self.state)):
            if isinstance(v, nnx.RngKey):
                values[path] = jax.random.fold_in(key, i)
            elif isinstance(v, nnx.RngState):
                values[path] = jnp.zeros(v.shape, v.dtype)
        stored = nnx.to_flat_state(self.state)
        return nnx.from_flat_state(
            (p, v.replace(values[p]) if isinstance(v, nnx.Variable) else values[p])
            for p, v in stored
        )


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A `Trainable` that is called as the networks of `bn_jax.lab.models` are.

    All variables but the parameters are its `batch_stats`.
    """

    trainable: Trainable

    def init(self, key: jax.Array, inputs: jax.Array, *, train: bool) -> dict[str, Any]:
        """The variables at the start; inputs `[n, ...]`."""
        params, rest = _parted(self.trainable.init(key, inputs))
        return {"params": params, "batch_stats": rest} if rest else {"params": params}

    def apply(
        self,
        variables: Mapping[str, Any],
        inputs: jax.Array,
        *,
        train: bool,
        mutable: Any = False,
        rngs: Mapping[str, jax.Array] | None = None,
    ) -> Any:
        """What the model returns; and where something is mutable, `batch_stats` after it."""
        own = {"params": variables["params"], **variables.get("batch_stats", {})}
        key = (rngs or {}).get("dropout")
        outputs, after = self.trainable.apply(own, inputs, train=train, key=key)
        if not mutable:
            return outputs
        rest = _parted(after)[1]
        return outputs, {"batch_stats": rest} if rest else {}


def _parted(variables):
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


def _swapped(make, norm, options, rngs):
    return swap(make(rngs), norm, **dict(options))


def _is_bound(name):
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def of_graph(make: Make) -> dict[str, Any]:
    """The graphdefs and the state of `OfNnx`."""
    graphdefs = []

    def state():
        module = nnx.clone(make(nnx.Rngs(0)))
        for train in (False, True):
            module.train() if train else module.eval()
            graphdefs.append(nnx.graphdef(module))
        return nnx.state(module)

    return {"state": jax.eval_shape(state), "graphdefs": tuple(graphdefs)}
