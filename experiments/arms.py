"""The arms of a comparison: from flags and a norm to what is trained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bn_jax.errors import UserError
from experiments.config import Config, listed

# What makes the networks of 224x224 images ones of 32x32 (Inception's of some 40 ms a step on
# two cores).
NARROW = {
    "inception": {"stem": "small", "width": 0.25, "blocks": ("3c", "4a", "4e", "5b")},
    "resnet18": {"stem": "small", "width": 0.25},
    "resnet50": {"stem": "small", "width": 0.25},
}


class Arm(NamedTuple):
    """What one arm of a comparison is.

    Attributes:
      norm: layer class, a partial of one, or None.
      changes: flags that it has otherwise than the comparison, by name.
      model: constructor arguments of the network beyond those that are flags.
      shuffle: whether every epoch has a new order, or all have that of the first.
    """

    norm: Callable[..., Any] | None
    changes: Mapping[str, Any] = {}
    model: Mapping[str, Any] = {}
    shuffle: bool = True

    def config(self, config: Config) -> Config:
        """The comparison's flags as this arm has them."""
        # What --quick changes is changed: a value of the arm's own that is a default stays.
        return dataclasses.replace(config, quick=False, **self.changes)

    @property
    def has_momentum(self) -> bool:
        """Whether the norm has running statistics whose momentum is still to be chosen."""
        layer = getattr(self.norm, "func", self.norm)
        return "momentum" in getattr(layer, "__dataclass_fields__", ())


def norm_arms() -> dict[str, Arm]:
    """The norms of `bn_jax.models`."""
    from bn_jax import models

    return {name: Arm(norm) for name, norm in models.NORMS.items()}


def chosen_arms(config: Config, known: Mapping[str, Arm]) -> dict[str, Arm]:
    """Those of the flag, in its order."""
    for name in config.arms:
        if name not in known:
            raise UserError(f"--arms: unknown {name!r}, choose from {', '.join(known)}")
    return {name: known[name] for name in config.arms}


def load_data(config: Config) -> Any:
    """The dataset, checked against the batch size."""
    import jax

    from bn_jax.data import load

    dataset = load(
        config.dataset,
        validation_fraction=config.validation_fraction,
        train_examples=config.train_examples,
        scaling=config.scaling,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        say=lambda text: print(text, file=sys.stderr),
    )
    examples = dataset.train.labels.size
    if config.batch_size > examples:
        raise UserError(
            f"--batch_size={config.batch_size} is more than the {examples} training examples "
            f"of {config.dataset} (validation examples apart)"
        )
    test = jax.tree.map(lambda v: v[: config.test_examples], dataset.test)
    return dataset._replace(test=test)


def in_steps(config: Config, dataset: Any) -> Config:
    """The flags with `epochs`, where given, as `steps` and `eval_every`."""
    if config.epochs is None:
        return config
    steps = dataset.train.labels.size // config.batch_size
    return dataclasses.replace(config, steps=config.epochs * steps, eval_every=steps)


def build_run(config: Config, arm: Arm, dataset: Any) -> Any:
    """One arm as a `bn_jax.training.run.Run`."""
    import jax

    from bn_jax.data import augmentation, batch_indices, same_batch_indices
    from bn_jax.training.metrics import cross_entropy
    from bn_jax.training.optimizers import optimizer
    from bn_jax.training.run import Run, Swept
    from bn_jax.training.schedules import schedule

    scaled = _scaled(config, arm, dataset)
    config = arm.config(config)
    _check_names(config)
    family = _family(config, arm)

    norm = grouped(config, arm)

    def model(swept, axis_name=None):
        own = norm
        if arm.has_momentum:
            own = functools.partial(norm, momentum=swept.momentum, axis_name=axis_name)
        return family(
            num_outputs=1 if dataset.num_classes == 2 else dataset.num_classes, norm=own
        )

    indices = batch_indices if arm.shuffle else same_batch_indices

    def batches(key, first_step, num_steps):
        examples = dataset.train.labels.size
        return indices(key, first_step, num_steps, examples, config.batch_size)

    varying = config.schedule != "constant" or config.warmup_steps
    rates = schedule(
        config.schedule, config.steps, warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps, decay_rate=config.decay_rate,
    )  # fmt: skip
    make_optimizer = functools.partial(
        optimizer, config.optimizer, schedule=rates if varying else None, l2=config.l2,
        weight_decay=config.weight_decay, decay_norms=config.decay_norms, clip=config.clip,
    )  # fmt: skip
    loss = functools.partial(cross_entropy, label_smoothing=config.label_smoothing)
    run = Run(model, make_optimizer, scaled, batches, loss, augmentation(config.augment))
    try:
        key, swept = jax.random.key(0), Swept()
        rows = jax.eval_shape(lambda: batches(key, 0, 1)[0])
        state = jax.eval_shape(run.init, key, swept, dataset.train.inputs)
        jax.eval_shape(run.step, state, swept, dataset.train, rows)
    except (TypeError, ValueError) as e:
        widths = f" --features={listed(config.features)}" if config.features else ""
        raise UserError(f"--model={config.model}{widths}: {e}") from e
    return run


def grouped(config, arm):
    """The arm's norm, with statistics of groups where flags say so and it is a BatchNorm."""
    from bn_jax.linen import BatchNorm, GhostBatchNorm
    from bn_jax.measure.layouts import layout

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
    own = arm.config(config)
    if own.scaling == config.scaling:
        return dataset.scaled
    if "binary" in (own.scaling, config.scaling):
        raise UserError(f"--scaling={config.scaling}: {own.scaling} arms want other pixels")
    other = load_data(own)
    return dataset._replace(offset=other.offset, factor=other.factor).scaled


def _check_names(config):
    from bn_jax import data, models
    from bn_jax.training.optimizers import RULES
    from bn_jax.training.schedules import SCHEDULES

    for name, values, known in (
        ("model", [config.model], models.FAMILIES),
        ("activation", [_activation(config)], models.ACTIVATIONS),
        ("optimizer", [config.optimizer], RULES),
        ("schedule", [config.schedule], SCHEDULES),
        ("places", config.places or (), models.OWN_PLACES.get(config.model, models.PLACES)),
        ("augment", config.augment, data.AUGMENTATIONS),
    ):
        for value in values:
            if value not in known:
                raise UserError(f"--{name}: unknown {value!r}, choose from {', '.join(known)}")


def _family(config, arm):
    """The network but for its norm and number of outputs."""
    from bn_jax import models

    family = models.FAMILIES[config.model]
    taken = {field.name for field in dataclasses.fields(family)}
    given = {
        "features": _features(config), "dropout": config.dropout, "places": config.places,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and name not in taken:
            raise UserError(f"--{name}: --model={config.model} has none to choose")
    own = {k: v for k, v in given.items() if v is not None}
    more = NARROW.get(config.model, {}) | dict(arm.model)
    return functools.partial(family, activation=_activation(config), **own, **more)


def _activation(config):
    # Sigmoids: the network of Ioffe & Szegedy 2015, section 4.1.
    own = {"lstm": "tanh"} | dict.fromkeys(("inception", "resnet18", "resnet50"), "relu")
    return config.activation or own.get(config.model, "sigmoid")


def _features(config):
    """As the network takes them: several widths, or the only one of an LSTM."""
    if config.model != "lstm":
        return config.features
    width, *more = config.features or (100,)
    if more:
        raise UserError(f"--features={listed(config.features)}: --model=lstm has one width")
    return width


def grid(config: Config, arm: Arm) -> list[Any]:
    """The points of an arm; only running statistics have a momentum to vary."""
    from bn_jax.measure import Point

    config = arm.config(config)
    momentums = config.momentums if arm.has_momentum else (None,)
    axes = (config.learning_rates, config.init_scales, momentums)
    return [Point(*values) for values in itertools.product(*axes)]
