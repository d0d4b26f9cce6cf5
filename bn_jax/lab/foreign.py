"""How anybody's model is called: what it is made with, its mode, its random numbers.

Found out once, from signatures and a trace; `Trainable.describe` says it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.errors import FlaxError, InvalidRngError, ModifyScopeVariableError

from bn_jax.errors import UserError
from bn_jax.lab.trainable import OfLinen, OfNnx, Trainable, of_graph
from bn_jax.surgery.calls import left_alone
from bn_jax.surgery.diagnose.modes import MODES
from bn_jax.surgery.intercept import Intercepted, Linen
from bn_jax.surgery.observe import used

# What constructors call the number of outputs, and that of inputs.
OUTPUTS = ("num_outputs", "num_classes", "n_classes", "classes", "out_features", "dout")
INPUTS = ("num_inputs", "in_features", "in_channels", "din")
_WANTED = "say a class of models, a model, or a function of the number of outputs"


def found(source: Any, name: str, num_outputs: int, inputs: jax.Array) -> Trainable:
    """Finds out how a model is made and called.

    A class or a function is called with the number of outputs, and that of inputs, by the
    names in `OUTPUTS` and `INPUTS` that it takes, and with `rngs` if it takes that. A function
    that has one other argument is given the number of outputs there. An NNX module that exists,
    or is made without `rngs`, has the same weights for all seeds.

    Args:
      source: a class of models, a model, or a function of the number of outputs.
      name: of it, for messages.
      num_outputs: how many the labels want.
      inputs: `[n, ...]`, of which shape and dtype matter.

    Raises:
      UserError: it is no model; it wants an argument that nothing is known of; or it has to
        know its mode and cannot be told.
    """
    make, same_start = _maker(source, name, num_outputs, inputs)
    made: list[Any] = []
    with _own_errors(name):
        jax.eval_shape(lambda: made.append(make(nnx.Rngs(0))))
    model = made[0]
    if not isinstance(model, Linen | nnx.Module):
        raise UserError(f"{name} makes a {type(model).__name__}, which is no model: {_WANTED}")
    plain = model.model if isinstance(model, Intercepted) else model
    first, *others = list(inspect.signature(plain.__call__).parameters.values())
    modes = {p.name: MODES[p.name] for p in others if p.name in MODES}
    for p in others:
        if p.name not in modes and _is_required(p):
            raise UserError(
                f"{name}: its call wants {p.name} beside {first.name}: give a default"
            )
    given = {"name": name, "how": "argument" if modes else "", "modes": modes}
    kind = _of_linen if isinstance(model, Linen) else _of_nnx
    with _own_errors(name):
        return kind(model, make, same_start, jax.eval_shape(lambda: inputs), given)


def _maker(source, name, num_outputs, inputs) -> tuple[Callable[[nnx.Rngs], Any], bool]:
    """From streams to the model; and whether it has weights without them."""
    if isinstance(source, Linen | nnx.Module):
        return (lambda rngs: source), isinstance(source, nnx.Module)
    if not callable(source):
        raise UserError(f"{name} is a {type(source).__name__}, which is no model: {_WANTED}")
    known = dict.fromkeys(OUTPUTS, num_outputs) | dict.fromkeys(INPUTS, inputs.shape[-1])
    parameters = _constructor(source)
    given = {p.name: known[p.name] for p in parameters if p.name in known}
    free = [p.name for p in parameters if p.name not in (*known, "rngs") and _is_required(p)]
    if len(free) == 1 and not given and not isinstance(source, type):
        given, free = {free[0]: num_outputs}, []
    if free:
        raise UserError(
            f"{name} is made with {', '.join(free)}: say a function of the number of outputs "
            "that makes the model, or give defaults"
        )
    if any(p.name == "rngs" for p in parameters):
        return (lambda rngs: source(**given, rngs=rngs)), False
    return (lambda rngs: source(**given)), True


def _constructor(source):
    """The parameters that are left to say; metaclasses of Flax hide those of a class."""
    if isinstance(source, functools.partial):
        made = functools.partial(_signed(source.func), *source.args, **source.keywords)
        return list(inspect.signature(made).parameters.values())
    return list(inspect.signature(_signed(source)).parameters.values())


def _signed(source):
    return functools.partial(source.__init__, None) if isinstance(source, type) else source


def _of_linen(model, make, same_start, inputs, given) -> Trainable:
    fields = {n: v for n, v in MODES.items() if hasattr(model, n)}
    models: tuple[Any, Any] = model, model
    if fields and not given["modes"]:
        given |= {"how": "field", "modes": fields}
        models = _with_fields(model, fields, False), _with_fields(model, fields, True)
    trainable = OfLinen(**given, models=models)
    variables = jax.eval_shape(trainable.init, jax.random.key(0), inputs)
    if not trainable.how and "batch_stats" in variables:
        trainable = dataclasses.replace(trainable, how="mutable batch_stats")
    trainable = dataclasses.replace(trainable, axes=_axes(trainable, models, variables, inputs))
    # Flax names a stream when it is wanted and not there.
    while wanted := _missing_stream(trainable, variables, inputs):
        trainable = dataclasses.replace(trainable, streams=(*trainable.streams, wanted))
    _check_mode(trainable, has_stats=False)
    return trainable


def _with_fields(model: Any, fields: dict[str, bool], train: bool) -> Any:
    if isinstance(model, Intercepted):
        return Intercepted(_with_fields(model.model, fields, train), model.hooks)
    return model.clone(**{name: training == train for name, training in fields.items()})


def _missing_stream(trainable, variables, inputs):
    for train in (False, True):
        try:
            jax.eval_shape(functools.partial(trainable.apply, train=train), variables, inputs)
        except InvalidRngError as e:
            name = re.search(r'PRNG for "(\w+)"', str(e))
            if name is None or name[1] in trainable.streams:
                raise
            return name[1]
        except ModifyScopeVariableError:
            # In evaluation, where statistics are not mutable: it is always in training.
            _check_mode(dataclasses.replace(trainable, how=""), has_stats=True)
            raise
    return None


def _of_nnx(module, make, same_start, inputs, given) -> Trainable:
    graph = of_graph(make)
    if not given["modes"] and graph["graphdefs"][0] != graph["graphdefs"][1]:
        given |= {"how": "train() and eval()"}
    states = nnx.to_flat_state(graph["state"])
    streams = {str(v.tag): None for _, v in states if isinstance(v, nnx.RngKey)}
    trainable = OfNnx(
        **given, make=make, **graph, same_start=same_start, streams=tuple(streams)
    )
    variables = jax.eval_shape(trainable.init, jax.random.key(0), inputs)
    axes = _axes(trainable, graph["graphdefs"], graph["state"], inputs)
    trainable = dataclasses.replace(trainable, axes=axes)
    for train in (False, True):
        jax.eval_shape(functools.partial(trainable.apply, train=train), variables, inputs)
    _check_mode(trainable, has_stats="batch_stats" in variables)
    return trainable


def _axes(trainable, models, variables, inputs):
    """The axes that layers name, by a trace of the model in training."""
    call = trainable.told(True)
    if isinstance(trainable, OfLinen):
        call["rngs"] = {"params": jax.random.key(0)}  # stands in for every stream
    return used(models[True], variables, inputs, stranger=left_alone, **call).axes


def _check_mode(trainable, has_stats):
    if trainable.how or not (has_stats or trainable.streams):
        return
    why = "running statistics" if has_stats else f"random numbers ({trainable.streams[0]})"
    raise UserError(
        f"{trainable.name} has {why} and cannot be told whether it trains: give its __call__ "
        f"an argument named one of {', '.join(MODES)}"
    )


def _is_required(p):
    return p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)


@contextlib.contextmanager
def _own_errors(name):
    """Within it an error of the model's own is one line with its name."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, NameError, AttributeError, FlaxError) as e:
        what = (str(e).splitlines() or [""])[0]
        raise UserError(f"{name}: {type(e).__name__}: {what}") from e
