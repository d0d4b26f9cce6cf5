"""How a model is called in training and in evaluation."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
from flax import nnx

from bn_jax.surgery.calls import KNOWN, BatchNorms, Call, attributes, left_alone
from bn_jax.surgery.intercept import (
    Intercepted,
    Model,
    Run,
    apply_and_update,
    evaluation,
    intercept,
)
from bn_jax.surgery.observe import Inputs, binding, used

# Keywords that say the mode, and what they are in training.
MODES: dict[str, bool] = dict.fromkeys(("train", "training", "is_training"), True)
MODES |= dict.fromkeys(("deterministic", "use_running_average"), False)


class Mode(NamedTuple):
    """A model in training or in evaluation, how it is called there, and its BatchNorms.

    Attributes:
      model: see `bn_jax.surgery`.
      call: keywords.
      places: positional arguments, by their numbers, that say the mode.
      run: how the model is called.
      norms: classes of BatchNorms.
    """

    model: Model
    call: dict[str, Any]
    places: dict[int, bool]
    run: Run = apply_and_update
    norms: BatchNorms = KNOWN

    def of(self, inputs: tuple) -> tuple:
        """The positional arguments in this mode."""
        return tuple(self.places.get(i, v) for i, v in enumerate(inputs))


def modes(
    model: Model,
    variables: Any,
    inputs: tuple,
    train: dict[str, Any] | None,
    evaluate: dict[str, Any] | None,
    norms: BatchNorms = KNOWN,
) -> tuple[Mode, Mode]:
    """The model in training and in evaluation.

    A model whose call takes arguments of `MODES` is given them, by position where `inputs` go
    as far. In NNX one that takes none is in the state that `train()` and `eval()` put it into.

    Args:
      model, variables: see `bn_jax.surgery`.
      inputs: of one batch.
      train, evaluate: further keywords of the calls, which precede.
      norms: classes of BatchNorms.
    """
    names = list(_parameters(model, variables))[1:]  # without self
    places = {i: MODES[k] for i, k in enumerate(names[: len(inputs)]) if k in MODES}
    known = {k: v for k, v in MODES.items() if k in names[len(inputs) :]}
    switched = not (known or places) and isinstance(model, nnx.GraphDef)

    def mode(training, given):
        into = _switched(model, variables, training) if switched else model
        call = {k: v == training for k, v in known.items()} | (given or {})
        at = {i: v == training for i, v in places.items()}
        made = Mode(into, call, at, norms=norms)
        args = made.of(inputs)
        axes = used(into, variables, *args, norms=norms, stranger=left_alone, **call).axes
        if training:
            return made._replace(run=_bound(apply_and_update, axes))
        alone, runs = intercept(into, variables, proceed_alone, norms, stranger=left_alone), []

        def find(variables, inputs):
            runs.append(evaluation(alone, variables, *inputs.args, **call))

        jax.eval_shape(binding(axes, find), variables, Inputs(args))
        return made._replace(run=_bound(runs[0], axes))

    return mode(True, train), mode(False, evaluate)


def _bound(run, axes):
    """The run, with axes of one device bound that nobody has."""

    def call(model, variables, *inputs, **call):
        function = binding(axes, lambda v, x: run(model, v, *x.args, **call))
        return function(variables, Inputs(inputs))

    return call


def _parameters(model, variables):
    model = model.model if isinstance(model, Intercepted) else model
    if isinstance(model, nnx.GraphDef):
        model = nnx.merge(model, variables, copy=True)
    return inspect.signature(type(model).__call__).parameters


def _switched(model, variables, training):
    module = nnx.merge(model, variables, copy=True)
    module.train() if training else module.eval()
    return nnx.graphdef(module)


def proceed_alone(call: Call, use_running_average: bool | None = None) -> Any:
    """`call.proceed` of a BatchNorm that is given the whole batch: no axis is mapped here."""
    names = ("axis_name", "axis_index_groups")
    with attributes(call.layer, **{n: None for n in names if hasattr(call.layer, n)}):
        return call.proceed(use_running_average)
