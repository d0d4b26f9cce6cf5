"""How a model is called in training and in evaluation."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from flax import nnx

from bn_jax.surgery.intercept import Call, Intercepted, Model, attributes

# Keywords that say the mode, and what they are in training.
MODES = {
    "train": True, "training": True, "is_training": True,
    "deterministic": False, "use_running_average": False,
}  # fmt: skip


class Mode(NamedTuple):
    """A model in training or in evaluation, and the keywords that it is called with there."""

    model: Model
    call: dict[str, Any]


def modes(
    model: Model,
    variables: Any,
    train: dict[str, Any] | None,
    evaluate: dict[str, Any] | None,
) -> tuple[Mode, Mode]:
    """The model in training and in evaluation.

    A model whose call takes keywords of `MODES` is given them. In NNX one that takes none is
    in the state that `train()` and `eval()` put it into.

    Args:
      model, variables: see `bn_jax.surgery`.
      train, evaluate: further keywords of the calls, which precede.
    """
    known = {k: v for k, v in MODES.items() if k in _parameters(model, variables)}
    switched = not known and isinstance(model, nnx.GraphDef)

    def mode(training, given):
        into = _switched(model, variables, training) if switched else model
        call = {k: v == training for k, v in known.items()} | (given or {})
        return Mode(into, call)

    return mode(True, train), mode(False, evaluate)


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
    with attributes(call.layer, axis_name=None, axis_index_groups=None):
        return call.proceed(use_running_average)
