"""The arms of `experiments.imagenet`: from flags to what is trained, and then to records."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.data.imagenet import Records, open_split
from bn_jax.errors import UserError
from bn_jax.measure.layouts import layout
from bn_jax.models import FAMILIES
from bn_jax.training.optimizers import RULES, optimizer
from bn_jax.training.schedules import SCHEDULES, schedule
from experiments.arms import Arm, chosen_arms, grid, grouped, norm_arms
from experiments.epochs import Sets
from experiments.imagenet_config import Config, check_known
from experiments.position import Position, evaluations
from experiments.streaming import Network, Programs

# Goyal et al. 2017, section 5.1: epochs at which the rate drops, of all.
DROPS, OF = (30, 60, 80), 90
# Top-1 on the validation set: Flax's ImageNet example; Ioffe & Szegedy 2015, section 4.2.2,
# BN-Baseline. Both for images of 224 x 224, as here by default.
PUBLISHED = {"resnet50": 0.767, "inception": 0.727}
NEAR = 0.01


def open_sets(config: Config) -> Sets:
    """The two splits.

    Raises:
      UserError: of `bn_jax.data.imagenet.open_split`; or a batch is larger than the set.
    """
    sets = Sets(
        _open(config, "train", config.train_examples),
        _open(config, config.test_split, config.test_examples),
    )
    examples = sets.train.ends[-1]
    if config.batch_size > examples:
        raise UserError(
            f"--batch_size={config.batch_size} is more than the {examples} training examples "
            f"of {config.dataset}"
        )
    return sets


def _open(config: Config, split: str, most: int | None) -> Records:
    records = open_split(config.dataset, config.data_dir, split)
    if most is None or most >= records.ends[-1]:
        return records
    return open_split(config.dataset, config.data_dir, f"{split}[:{most}]")


def build(config: Config, sets: Sets) -> tuple[Config, dict[str, Network]]:
    """The flags with the steps that follow from the data, and a network for each arm.

    Raises:
      UserError: a flag is unknown, or the warm-up has no end.
    """
    # What is unknown is refused before anything is written.
    layout(config.parallel, 1, 1)
    check_known(config, {"optimizer": RULES, "schedule": ("goyal", *SCHEDULES)})
    epoch = sets.train.ends[-1] // config.batch_size
    steps = config.steps or config.epochs * epoch
    config = dataclasses.replace(
        config, quick=False, steps=steps, eval_every=min(config.eval_every or epoch, steps)
    )
    factors = _factors(config, round(config.warmup_epochs * epoch))
    arms = chosen_arms(config, norm_arms())
    classes = sets.train.num_classes
    return config, {n: _network(config, arm, classes, factors) for n, arm in arms.items()}


def _factors(config, warmup):
    """On the learning rate, at every step."""
    if warmup >= config.steps:
        raise UserError(
            f"--warmup_epochs={config.warmup_epochs:g} are {warmup} of {config.steps} steps: "
            "choose fewer, or more steps"
        )
    name = "constant" if config.schedule == "goyal" else config.schedule
    shape = schedule(name, config.steps, warmup_steps=warmup)
    if config.schedule != "goyal":
        return shape
    drops = {config.steps * epoch // OF: 0.1 for epoch in DROPS}
    drop = optax.piecewise_constant_schedule(1.0, drops)
    return lambda count: shape(count) * drop(count)


def _network(config: Config, arm: Arm, classes: int, factors: optax.Schedule) -> Network:
    norm = grouped(config, arm)
    half = jnp.bfloat16 if config.dtype == "bfloat16" else None

    def model(axis_name):
        own = norm
        if arm.has_momentum:
            own = functools.partial(norm, momentum=config.momentum, axis_name=axis_name)
        family = FAMILIES[config.model]
        return family(num_outputs=classes, norm=own, width=config.width, dtype=half)

    (point,) = grid(config, arm)
    rule = optimizer(
        config.optimizer, point.learning_rate, schedule=factors, l2=config.l2,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    return Network(model, rule, config.label_smoothing)


def compiled(config: Config, network: Network) -> tuple[Programs, float]:
    """The network's programs, and how many seconds that took."""
    start = time.perf_counter()
    mine = config.batch_size // jax.process_count()
    devices = layout(config.parallel, 1, 1)
    programs = Programs(network, devices, mine, config.image_size)
    return programs, time.perf_counter() - start


def record(config: Config, name: str, position: Position, compilation: float) -> dict[str, Any]:
    """Of a training that has ended: as of `bn_jax.measure.sweep`, and more.

    `test_top5_accuracy` is a list as the others, `bad_examples` of both sets together.
    """
    (point,) = grid(config, norm_arms()[name])
    diverged = position.diverged_at if position.diverged_at >= 0 else None
    found = [
        h for h in position.history
        if np.isfinite(h["test_loss"]) and (diverged is None or h["step"] <= diverged)
    ]  # fmt: skip
    steps = evaluations(config)

    def series(metric):
        values = [_rounded(h[metric]) for h in found]
        return values + [None] * (len(steps) - len(values))

    tested = {k: series(f"test_{k}") for k in ("loss", "accuracy")}
    training = position.seconds["training"]
    return {
        "arm": name,
        **point._asdict(),
        "seed": config.seed,
        "steps": steps,
        **{f"train_{k}": series(f"train_{k}") for k in tested},
        **{f"{split}_{k}": v for split in ("validation", "test") for k, v in tested.items()},
        "test_top5_accuracy": series("test_top5_accuracy"),
        "diverged_at": diverged,
        "stopped_at": None,
        "restored": None,
        "bad_examples": position.bad + position.test_bad,
        "skipped_steps": position.skipped,
        "seconds": {
            "per_step": training / max(position.step, 1),
            **position.seconds,
            "runs_at_once": 1,
            "compilation": compilation,
        },
    }


def _rounded(value):
    return round(value, 6) if np.isfinite(value) else None


def rows(config: Config, records: list[dict]) -> list[dict]:
    """What every arm ended with, beside what was published of such a network."""
    found = []
    for r in records:
        top1, top5 = (r[k][-1] or 0.0 for k in ("test_accuracy", "test_top5_accuracy"))
        rate = config.batch_size / r["seconds"]["per_step"]
        found += [
            _row(f"{r['arm']}: top-1 at the end", _percent(top1), *_published(config, r, top1)),
            _row(f"{r['arm']}: top-5 at the end", _percent(top5)),
            _row(f"{r['arm']}: images per second in training", f"{rate:,.0f}"),
            _row(f"{r['arm']}: broken images left out", str(r["bad_examples"])),
            _row(f"{r['arm']}: steps skipped", str(r["skipped_steps"])),
        ]
    return found


def _row(quantity, here, source=None, agrees=None):
    return {"quantity": quantity, "here": here, "source": source, "agrees": agrees}


def _percent(share):
    return f"{100 * share:.1f} %"


def _published(config, record, top1):
    source = PUBLISHED.get(config.model)
    whole = config.dataset.startswith("imagenet2012") and config.width == 1
    if source is None or not whole or record["arm"] != "bn":
        return ()
    return _percent(source), top1 > source - NEAR
