"""The arms of a comparison: from flags and a norm to what is trained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from bn_jax.errors import UserError
from bn_jax.lab import data, models, own, sizes
from bn_jax.lab.config import NARROW, Config, Data, Grid, Network, Optimization
from bn_jax.lab.data import Dataset
from bn_jax.lab.fields import MOST, Flags, check_known, listed
from bn_jax.lab.models import Norm
from bn_jax.lab.own import Given
from bn_jax.lab.sweeps import Point
from bn_jax.lab.sweeps.layouts import PARALLEL, layout
from bn_jax.lab.training.optimizers import optimizer
from bn_jax.lab.training.run import Run, Swept
from bn_jax.lab.training.schedules import SCHEDULES, schedule
from bn_jax.linen import BatchNorm, GhostBatchNorm

C = TypeVar("C", bound=Config)
F = TypeVar("F", bound=Flags)
# What a BatchNorm says of a batch of one example.
ALONE = "one element per feature"


class Arm(NamedTuple):
    """What one arm of a comparison is.

    Attributes:
      norm: layer class, a partial of one, or None; in a model of the user's own the name of a
        norm that takes the place of its BatchNorms.
      changes: flags that it has otherwise than the comparison, by name.
      model: constructor arguments of the network beyond those that are flags.
      shuffle: whether every epoch has a new order, or all have that of the first.
    """

    norm: Norm | str | None
    changes: Mapping[str, Any] = {}
    model: Mapping[str, Any] = {}
    shuffle: bool = True

    def config(self, config: F) -> F:
        """The comparison's flags as this arm has them."""
        return config.changed(self.changes)

    @property
    def has_momentum(self) -> bool:
        """Whether the norm has running statistics whose momentum is still to be chosen."""
        layer = getattr(self.norm, "func", self.norm)
        return "momentum" in getattr(layer, "__dataclass_fields__", ())


def norm_arms(own_model: bool = False) -> dict[str, Arm]:
    """The norms of `bn_jax.lab.models`, or those of a model of the user's own."""
    if own_model:
        return {name: Arm(name) for name in own.OWN_NORMS}
    return {name: Arm(norm) for name, norm in models.NORMS.items()}


def chosen_arms(names: Sequence[str], known: Mapping[str, Arm]) -> dict[str, Arm]:
    """Those of the flag, in its order."""
    check_known("arms", names, known)
    return {name: known[name] for name in names}


def load_data(config: Data, given: Given = own.NOTHING) -> Dataset:
    """The dataset, checked against the batch size."""
    dataset = data.load(
        own.data_of(config, given),
        validation_fraction=config.validation_fraction,
        train_examples=config.train_examples,
        scaling=config.scaling,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        say=own.say,
    )
    examples = len(dataset.train.labels)
    if config.batch_size > examples:
        raise UserError(
            f"--batch_size={config.batch_size} is more than the {examples} training examples "
            f"of {config.dataset} (validation examples apart)"
        )
    test = jax.tree.map(lambda v: v[: config.test_examples], dataset.test)
    return dataset._replace(test=test)


def in_steps(config: C, dataset: Dataset) -> C:
    """The flags with `epochs`, where given, as `steps` and `eval_every`."""
    if config.epochs is None:
        return config
    steps = len(dataset.train.labels) // config.batch_size
    if config.epochs * steps > MOST:
        raise UserError(f"--epochs={config.epochs}: of {steps} steps each, at most {MOST} fit")
    return dataclasses.replace(config, steps=config.epochs * steps, eval_every=steps)


def build_run(config: Config, arm: Arm, dataset: Dataset, given: Given = own.NOTHING) -> Run:
    """Returns what trains one arm; `given` has objects in place of flags.

    Raises:
      UserError: a flag has no such value, or the network cannot be built or does not fit.
    """
    scaled = _scaled(config, arm, dataset)
    config = arm.config(config)
    has_own = own.has_own_model(config, given)
    _check_names(config, has_own)
    if has_own:
        adapted = own.network(config, str(arm.norm), dataset, given)
        model: Callable[..., Any] = lambda swept, axis_name=None: adapted  # noqa: E731
    else:
        model = _model(config, arm, dataset)

    def batches(key, first_step, num_steps):
        indices = data.batch_indices if arm.shuffle else data.same_batch_indices
        examples = len(dataset.train.labels)
        return indices(key, first_step, num_steps, examples, config.batch_size)

    augment = data.augmentation(config.augment)
    rule = rule_of(config, config.steps, given)
    run = Run(
        model, rule, scaled, batches, *own.objective(config, dataset, given), augment=augment
    )
    _check_network(config, arm, run, dataset)
    return run


def _model(config: Config, arm: Arm, dataset: Dataset) -> Callable[..., nn.Module]:
    """From the swept numbers to one of the laboratory's networks."""
    norm, family = grouped(config, arm), _family(config, arm)
    classes, labels = dataset.num_classes, dataset.train.labels
    # Two classes are one logit; without classes there are numbers to predict.
    outputs = (1 if classes == 2 else classes) or math.prod(labels.shape[1:])

    def model(swept, axis_name=None):
        layer = norm
        if norm is not None and arm.has_momentum:
            layer = functools.partial(norm, momentum=swept.momentum, axis_name=axis_name)
        return family(num_outputs=outputs, norm=layer)

    return model


def rule_of(config: Optimization, steps: int, given: Given = own.NOTHING) -> Callable[..., Any]:
    """From a learning rate to the optimizer of a run of so many steps."""
    varies = config.schedule != "constant" or config.warmup_steps
    rates = schedule(
        config.schedule, steps, warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps, decay_rate=config.decay_rate,
    )  # fmt: skip
    return functools.partial(
        optimizer,
        own.optimizer_of(config, given),
        schedule=rates if varies else None,
        l2=config.l2,
        weight_decay=config.weight_decay,
        decay_norms=config.decay_norms,
        clip=config.clip,
    )


def _check_network(config: Config, arm: Arm, run: Run, dataset: Dataset) -> None:
    """Raises a UserError if the network cannot take a step, or does not fit into memory."""
    widths = f" --features={listed(config.features)}" if config.features else ""
    model_flags = f"--model={config.model}{widths}"
    try:
        key, swept = jax.random.key(0), Swept()
        rows = jax.eval_shape(lambda: run.batches(key, jnp.int32(0), 1)[0])
        state = jax.eval_shape(run.init, key, swept, dataset.train.inputs)
        jax.eval_shape(run.step, state, swept, dataset.train, rows)
    except (OverflowError, TypeError, ValueError) as e:
        if ALONE in str(e):
            size = "bn_group_size" if config.bn_group_size == 1 else "batch_size"
            raise UserError(
                f"--{size}={getattr(config, size)}: {ALONE}, which has no variance to "
                "normalise by; choose 2 or more, or --arms without BatchNorm"
            ) from e
        raise UserError(f"{model_flags}: {e}") from e
    sizes.check_network(model_flags, state.train)
    at_once = min(config.max_runs_at_once or 1, len(grid(config, arm)) * config.seeds)
    sizes.check_network(f"--max_runs_at_once={at_once} {model_flags}", state.train, at_once)


def grouped(config: Config, arm: Arm) -> Norm | None:
    """The arm's norm, with statistics of groups where flags say so and it is a BatchNorm."""
    assert not isinstance(arm.norm, str)
    size = config.bn_group_size
    if size is None or getattr(arm.norm, "func", arm.norm) is not BatchNorm:
        return arm.norm
    devices = layout(config.parallel, len(grid(config, arm)), config.seeds).parts
    each = -(-config.batch_size // devices)
    if devices > 1 and size and each % size and size % each:
        raise UserError(
            f"--bn_group_size={size}: {devices} devices have {each} examples each of a "
            f"batch of {config.batch_size}; choose a divisor or a multiple of {each}"
        )
    given = getattr(arm.norm, "keywords", {})
    return functools.partial(GhostBatchNorm, group_size=size or each, **given)


def _scaled(config, arm, dataset):
    """From stored inputs to those of the arm, whose scaling may be another."""
    changed = arm.config(config)
    if changed.scaling == config.scaling:
        return dataset.scaled
    if "binary" in (changed.scaling, config.scaling):
        raise UserError(f"--scaling={config.scaling}: {changed.scaling} arms want other pixels")
    other = load_data(changed)
    return dataset._replace(offset=other.offset, factor=other.factor).scaled


def _check_names(config: Config, has_own_model: bool) -> None:
    for name, values, known in (
        ("model", [] if has_own_model else [config.model], models.FAMILIES),
        ("activation", [_activation(config)], models.ACTIVATIONS),
        ("schedule", [config.schedule], SCHEDULES),
        ("places", config.places or (), models.OWN_PLACES.get(config.model, models.PLACES)),
        ("augment", config.augment, data.AUGMENTATIONS),
        ("parallel", [config.parallel], PARALLEL),
    ):
        check_known(name, values, known)


def _family(config: Network, arm: Arm) -> Callable[..., nn.Module]:
    """The network but for its norm and number of outputs."""
    family = models.FAMILIES[config.model]
    taken = {field.name for field in dataclasses.fields(family)}
    given = {
        "features": _features(config), "dropout": config.dropout, "places": config.places,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and name not in taken:
            raise UserError(f"--{name}: --model={config.model} has none to choose")
    said = {k: v for k, v in given.items() if v is not None}
    more = NARROW.get(config.model, {}) | dict(arm.model)
    return functools.partial(family, activation=_activation(config), **said, **more)


def _activation(config: Network) -> str:
    # Sigmoids: the network of Ioffe & Szegedy 2015, section 4.1.
    usual = {"lstm": "tanh"} | dict.fromkeys(("inception", "resnet18", "resnet50"), "relu")
    return config.activation or usual.get(config.model, "sigmoid")


def _features(config: Network) -> int | tuple[int, ...] | None:
    """As the network takes them: several widths, or the only one of an LSTM."""
    if config.model != "lstm":
        return config.features
    width, *more = config.features or (100,)
    if more:
        raise UserError(f"--features={listed(config.features)}: --model=lstm has one width")
    return width


def grid(config: Grid, arm: Arm) -> list[Point]:
    """The points of an arm; only running statistics have a momentum to vary."""
    config = arm.config(config)
    momentums = config.momentums if arm.has_momentum else (None,)
    axes = (config.learning_rates, config.init_scales, momentums)
    return [Point(*values) for values in itertools.product(*axes)]
