"""What a user brings to a comparison: a model, data, an optimizer, a loss, a metric.

Each is an object, or the text of a flag that says where one is.
"""

from __future__ import annotations

import functools
import re
import sys
import zlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bn_jax.errors import UserError
from bn_jax.lab import foreign
from bn_jax.lab.config import Config, Data, Optimization
from bn_jax.lab.data import Dataset
from bn_jax.lab.loading import is_named, load_object
from bn_jax.lab.trainable import Adapted, Trainable
from bn_jax.lab.training.metrics import correct, cross_entropy, squared_error
from bn_jax.lab.training.optimizers import Alias, parsed
from bn_jax.lab.training.step import Loss, Metric
from bn_jax.surgery.norms import NORMS

LOSSES = ("cross_entropy", "squared_error")
METRICS = ("accuracy", "r2")
# Arms of a model of one's own: "flax" leaves it as it was.
OWN_NORMS = (*NORMS, "flax")
VERSION = re.compile(r"[\w/.-]+:[\d.*]+")  # of a set of tensorflow-datasets


class Given(NamedTuple):
    """Objects in place of the flags of their names; None for those that the flags say."""

    model: Any = None
    data: Any = None
    optimizer: Alias | None = None
    loss: Loss | None = None
    metric: Metric | None = None


NOTHING = Given()


def has_own_model(config: Config, given: Given) -> bool:
    """Whether the model is none of `bn_jax.lab.models`."""
    return given.model is not None or is_named(config.model)


def data_of(config: Data, given: Given) -> Any:
    """Returns what `bn_jax.lab.data.load` takes."""
    if given.data is not None:
        return given.data
    if is_named(config.dataset) and not VERSION.fullmatch(config.dataset):
        found = load_object(config.dataset, "dataset")
        return found() if callable(found) else found
    return config.dataset


def network(config: Config, norm: str, dataset: Dataset, given: Given) -> Adapted:
    """Returns the user's model with the norm in place of its BatchNorms.

    Raises:
      UserError: it is no model, cannot be called, has no BatchNorm, or its outputs do not fit
        the labels.
    """
    for name in ("features", "activation", "places", "dropout", "bn_group_size"):
        if getattr(config, name) is not None:
            raise UserError(f"--{name}: --model={config.model} says that itself")
    source = load_object(config.model, "model") if given.model is None else given.model
    inputs = dataset.scaled(dataset.train.inputs[:2])
    labels = dataset.train.labels
    outputs = dataset.num_classes or int(np.prod(labels.shape[1:], dtype=int))
    trainable = foreign.found(source, config.model, outputs, inputs)
    if given.loss is None and not is_named(config.loss or ""):
        _check_outputs(trainable, inputs, dataset, outputs)
    if norm == "flax":
        return trainable.module()
    try:
        swapped = trainable.swapped(norm)
        jax.eval_shape(swapped.init, jax.random.key(0), inputs)
    except (TypeError, ValueError) as e:
        first = str(e).partition("\n")[0]
        raise UserError(f"--model={config.model} --arms: {norm}: {first}") from e
    return swapped.module()


def describe(config: Config, dataset: Dataset, given: Given) -> str:
    """Returns a line about the user's model: how it is called."""
    module = network(config, "flax", dataset, given)
    return module.trainable.describe()


def _check_outputs(
    trainable: Trainable, inputs: jax.Array, dataset: Dataset, outputs: int
) -> None:
    variables = jax.eval_shape(trainable.init, jax.random.key(0), inputs)
    call = functools.partial(trainable.apply, train=False)
    found, _ = jax.eval_shape(call, variables, inputs)
    shape = getattr(found, "shape", None)
    wanted = (len(inputs), outputs)
    fits = [wanted, (len(inputs), 1)] if dataset.num_classes == 2 else [wanted]
    fits += [wanted[:1]] if not dataset.num_classes and outputs == 1 else []
    if shape not in fits:
        what = f"{dataset.num_classes} classes" if dataset.num_classes else "numbers to predict"
        shown = f"has the shape {list(shape)}" if shape else f"is a {type(found).__name__}"
        raise UserError(
            f"{trainable.name}: for {len(inputs)} examples its output {shown}, and the {what} "
            f"of the labels want {list(wanted)}; give a loss and a metric that take it, or "
            "another model"
        )


class Objective(NamedTuple):
    """The loss in training and in evaluation, and the metric: of every example, `[n]`."""

    loss: Loss
    tested: Loss
    metric: Metric


def objective(config: Config, dataset: Dataset, given: Given) -> Objective:
    """Returns what is minimised, and what is reported: by default as the labels are."""
    numbers = not dataset.num_classes
    loss, metric = given.loss, given.metric
    if loss is None and is_named(config.loss or ""):
        loss = load_object(config.loss or "", "loss")
    if metric is None and is_named(config.metric or ""):
        metric = load_object(config.metric or "", "metric")
    name = _chosen("loss", config.loss, LOSSES, numbers) if loss is None else None
    if metric is None and _chosen("metric", config.metric, METRICS, numbers) == "r2":
        variance = float(jnp.var(dataset.test.labels, axis=0).sum()) or 1.0
        metric = functools.partial(_r2, variance)
    metric = correct if metric is None else metric
    if loss is not None or name == "squared_error":
        if config.label_smoothing:
            raise UserError("--label_smoothing: it is of cross_entropy alone")
        return Objective(loss or squared_error, loss or squared_error, metric)
    smoothed = functools.partial(cross_entropy, label_smoothing=config.label_smoothing)
    return Objective(smoothed, cross_entropy, metric)


def _chosen(flag: str, name: str | None, known: tuple[str, str], numbers: bool) -> str:
    if name is None:
        return known[numbers]
    if name not in known:
        raise UserError(
            f"--{flag}={name}: choose from {', '.join(known)}, or package.module:name"
        )
    if (name == known[1]) != numbers:
        labels = "numbers" if numbers else "classes"
        raise UserError(f"--{flag}={name}: the labels are {labels}, choose {known[numbers]}")
    return name


def _r2(variance: float, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """1 - squared error / variance of the test labels, whose mean is R squared."""
    return 1 - squared_error(outputs, labels) / variance


def measure(config: Config, dataset: Dataset, given: Given) -> str:
    """Returns the name of the metric: "accuracy", "r2", or that of the user's function."""
    if given.metric is not None:
        return shown(given.metric)
    return (config.metric or METRICS[not dataset.num_classes]).rpartition(":")[2]


def optimizer_of(config: Optimization, given: Given = NOTHING) -> str | Alias:
    """Returns a name of `RULES`, or a function from a learning rate to an optimizer.

    Raises:
      UserError: it is none.
    """
    name = config.optimizer
    if given.optimizer is None and not is_named(name):
        found = parsed(name)
    else:
        found = load_object(name, "optimizer") if given.optimizer is None else given.optimizer
        try:
            made = found(0.1)
        except TypeError as e:
            raise UserError(f"--optimizer={name}: called with a learning rate: {e}") from e
        if not isinstance(made, optax.GradientTransformation):
            raise UserError(
                f"--optimizer={name} makes a {type(made).__name__}: wanted is a function from "
                "a learning rate to an optax transformation"
            )
    if not isinstance(found, str) and config.weight_decay:
        raise UserError(
            f"--weight_decay: --optimizer={name} has its own, as in adamw(weight_decay=0.05)"
        )
    return found


def shown(value: Any) -> str:
    """Returns a name for an object, for `config.json` and the page."""
    if isinstance(value, str):
        return value
    if isinstance(value, nn.Module | nnx.Module):
        return type(value).__name__
    if name := getattr(value, "__name__", None):
        return name
    if isinstance(value, functools.partial):
        return shown(value.func)
    leaves = jax.tree.leaves(value)
    if leaves and all(hasattr(leaf, "dtype") for leaf in leaves):
        # Data of another content is another run.
        crc = 0
        for leaf in leaves:
            crc = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, crc)
        return f"arrays {crc:08x}"
    return type(value).__name__


def say(text: str) -> None:
    """Prints a line that is no part of the results."""
    print(text, file=sys.stderr)
