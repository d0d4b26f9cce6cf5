r"""Inception with BatchNorm at higher and higher learning rates, against Inception without.

Ioffe & Szegedy 2015, section 4.2, on small images: the paper's network with narrower blocks
and a stem of one convolution. Steps to the best accuracy of Inception and highest
accuracy, in the form of the paper's figure 3; then the mean of several networks, figure 4.

Arms: Inception has dropout, local response normalisation, L2, an exponential decay of the
learning rate, shifted, mirrored and distorted images. BN-Baseline has BatchNorm before each
nonlinearity besides. BN-x5 and BN-x30 have 5 and 30 times the rate and the other changes of
section 4.2.1: no dropout, a fifth of the L2, a decay 6 times as fast, no local response
normalisation, no distortion. Training examples are shuffled afresh in every epoch for all
arms; the paper's "more thoroughly" is this, and `--shuffle=False` takes it from all of them.
Of BN-Baseline each of these is a flag: `--arms=bn_baseline` with `--learning_rates`,
`--dropout`, `--l2`, `--decay_rate`, `--local_response_norm`, `--shuffle`, `--augment`.

Not stated in the paper, and so from elsewhere: the decay (4 % every 8 epochs) from
Szegedy et al. 2015 ("Going deeper with convolutions"), the weight of L2 from the network's
later implementation in TensorFlow. A run here stands for 6 million steps of the paper, in
which BN-x30 got to its best: 150 epochs, in which 4 % every 8 leave .47 of the rate.

The paper's network and the 31 million steps of its Inception, for a GPU and a set of images of
224x224 (NAME); 320,292 batches are 8 epochs of ImageNet:

    python -m experiments.inception --dataset=NAME --stem=imagenet --width=1 \
        --blocks=3a,3b,3c,4a,4b,4c,4d,4e,5a,5b --steps=31000000 --eval_every=10000 \
        --decay_rate=0.96 --decay_steps=320292
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from bn_jax.lab import flags
from bn_jax.lab.config import NARROW
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import fixed, flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    import jax
    import jax.numpy as jnp

    from bn_jax.lab import comparison
    from bn_jax.lab.arms import Arm, norm_arms
    from bn_jax.lab.experiment import Training, layer_table
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.models import Inception
    from bn_jax.lab.models.inception import BLOCKS
    from bn_jax.lab.report.text import in_line, number, percent, whole
    from bn_jax.lab.statistics import ArmResult, Summary
    from bn_jax.lab.statistics.convergence import Estimate
    from bn_jax.lab.watchers import Weights
    from bn_jax.linen import BatchNorm
    from experiments import inception_ensemble

NETWORK = NARROW["inception"]
EXPERIMENT = "inception"
QUESTION = "How much faster does Inception train with BatchNorm and the rates that it allows?"
PARAMETERS = 13.6e6  # section 4.2
PARAMETERS_REASON = (
    "Counted from the paper's figure 5, with a projection of 96 instead of the 128 printed in "
    "4c and 4d: with 128 their outputs have 608 channels, not the 576 of the next rows."
)
DROPOUTS = (0.05, 0.1)  # of the ensemble's networks, in turn (section 4.2.3)
# Figure 3: millions of steps to 72.2 %, and the maximum accuracy in per cent.
PUBLISHED = {
    "inception": (31.0, 72.2),
    "bn_baseline": (13.3, 72.7),
    "bn_x5": (2.1, 73.0),
    "bn_x30": (2.7, 74.8),
    "bn_x5_sigmoid": (None, 69.8),
}
# Section 4.2.2.
FAILED = {"inception_x5": "diverged", "inception_sigmoid": "at chance"}


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.inception --help`."""

    QUICK: ClassVar = {
        "dataset": "digits", "augment": ("shift", "distort"), "blocks": ("3c", "4a"),
        "width": 0.125, "learning_rates": (0.01,), "steps": 300, "eval_every": 20,
        "ensemble": 2,
    }  # fmt: skip

    dataset: str = flag("cifar10")
    validation_fraction: float = flag(0.1)
    model: str = fixed("inception")
    stem: str = flag(
        NETWORK["stem"],
        "what precedes the blocks: small, a convolution that leaves half of height and width, "
        "or imagenet, the paper's, which leaves an eighth",
    )
    width: float = flag(
        NETWORK["width"], "the network's share of the paper's channels", above=0
    )
    blocks: tuple[str, ...] = flag(
        NETWORK["blocks"], "those that the network has, of 3a,3b,3c,4a,4b,4c,4d,4e,5a,5b"
    )
    activation: str = flag("relu", "relu, sigmoid, tanh, elu or gelu, in arms that do not say")
    arms: tuple[str, ...] = flag(
        tuple(PUBLISHED),
        "networks to compare, of these, inception_x5, inception_sigmoid and the arms of "
        "experiments.compare",
    )
    learning_rates: tuple[float, ...] = flag(
        (0.0015,), "of inception and bn_baseline; x5 and x30 have 5 and 30 times as much"
    )
    optimizer: str = flag("sgd_momentum")
    schedule: str = flag("exponential")
    decay_rate: float = flag(
        0.776, "what one decay multiplies the learning rate by; its sixth power in x5 and x30"
    )
    dropout: float | None = flag(0.4, "before the last layer; none in x5 and x30")
    l2: float = flag(
        4e-5,
        "l2 / 2 times the sum of squared kernels is added to the loss; a fifth in x5 and x30",
    )
    augment: tuple[str, ...] = flag(
        ("shift", "flip", "distort"),
        "changes to training images, of shift, flip, distort; without distort in x5 and x30",
    )
    local_response_norm: bool | None = flag(
        None,
        "in the stem of every arm; by default in that of inception, inception_x5, "
        "inception_sigmoid and bn_baseline alone",
    )
    shuffle: bool = flag(
        True, "every epoch in a new order, in all arms; else all in the order of the first"
    )
    seeds: int = flag(1)
    batch_size: int = flag(32)
    eval_every: int = flag(100)
    ensemble: int = flag(
        6, "networks whose probabilities are averaged; 0: none", at_least=0, at_most=1000
    )
    ensemble_scale: float = flag(
        1.5, "factor on the initial weights of those networks", above=0
    )
    full: bool = flag(
        False,
        "print the layers of the paper's network, for images of 224x224, first; --stem, "
        "--width and --blocks decide what is trained",
    )


def run(config: Config) -> dict[str, Any]:
    """Compares, fills the workdir, prints the tables; the summary comes back."""
    if config.full:
        print(layer_table(*full_network()).strip())
    others = members(config)
    weights = Weights(lambda arm, seed: arm in others)
    return comparison.run(
        config, experiment=EXPERIMENT, question=QUESTION, known=arms(config), watch=weights,
        further=lambda training: conclude(training, weights.kept),
    )  # fmt: skip


def arms(config: Config) -> dict[str, Arm]:
    """The networks of figure 3, the two that failed, and the norms of a comparison."""
    network = {"stem": config.stem, "width": config.width, "blocks": config.blocks}
    if config.local_response_norm is not None:
        network["local_response_norm"] = config.local_response_norm
    original = {"local_response_norm": True} | network
    x5, x30 = accelerated(config, 5), accelerated(config, 30)
    sigmoid = {"activation": "sigmoid"}
    norms = {name: arm._replace(model=network) for name, arm in norm_arms().items()}
    known = norms | {
        "inception": Arm(None, model=original),
        "inception_x5": Arm(None, {"learning_rates": x5["learning_rates"]}, original),
        "inception_sigmoid": Arm(None, sigmoid, original),
        "bn_baseline": Arm(BatchNorm, model=original),
        "bn_x5": Arm(BatchNorm, x5, network),
        "bn_x30": Arm(BatchNorm, x30, network),
        "bn_x5_sigmoid": Arm(BatchNorm, x5 | sigmoid, network),
    }
    return {name: arm._replace(shuffle=config.shuffle) for name, arm in known.items()}


def accelerated(config: Config, factor: float) -> dict[str, Any]:
    """The changes of section 4.2.1, with so many times the learning rate."""
    return {
        "learning_rates": tuple(factor * rate for rate in config.learning_rates),
        "dropout": 0.0,
        "l2": config.l2 / 5,
        "decay_rate": config.decay_rate**6,
        "augment": tuple(name for name in config.augment if name != "distort"),
    }


def members(config: Config) -> dict[str, tuple[Arm, range]]:
    """The ensemble: BN-x30 with larger initial weights, dropout, per-activation BatchNorm."""
    x30 = arms(config)["bn_x30"]
    model = {**x30.model, "per_activation_last": True}
    found = {}
    for i, dropout in enumerate(DROPOUTS[: config.ensemble]):
        own = {"dropout": dropout, "init_scales": (config.ensemble_scale,)}
        seeds = range(config.seed + i, config.seed + config.ensemble, len(DROPOUTS))
        arm = x30._replace(changes={**x30.changes, **own}, model=model)
        found[f"ensemble, dropout {dropout:g}"] = arm, seeds
    return found


def full_network() -> tuple[Inception, jax.Array]:
    """The paper's network and an image for it."""
    return Inception(norm=BatchNorm), jnp.zeros((1, 224, 224, 3))


def conclude(training: Training[Config], kept: dict) -> Findings:
    """Figure 3's and figure 4's rows beside ours, and the errors of the ensemble."""
    config, dataset, figures = training.config, training.dataset, []
    size = "x".join(map(str, dataset.train.inputs.shape[1:3]))
    published = [*rows(training.summary, 1 / dataset.num_classes)]
    published += [network_row(config, size), parameter_row()]
    if config.ensemble:
        more, figure = inception_ensemble.show(training, members(config), kept)
        published, figures = published + more, [figure]
    return Findings(published=published, figures=figures)


def rows(summary: Summary, chance: float) -> Iterator[Published]:
    """Steps to the baseline's best and highest accuracy of every arm, and ratios of steps.

    `agrees` compares directions, as the sizes are others: whether an arm's highest accuracy is
    on the same side of Inception's, and whether it takes fewer steps than Inception.
    """
    base = summary.arms[0]
    comparable = base.arm == "inception"
    goal = f"{percent(summary.target.value)} %"
    for arm in summary.arms:
        name = arm.arm
        steps, best = in_line(arm.steps_to_target, whole), in_line(arm.max_accuracy, percent)
        yield Published(
            quantity=f"{name}: steps to {goal}, maximum accuracy (%)",
            here=f"{steps}, {best}",
            source=_source(name),
            agrees=_agrees(arm, base, chance) if comparable else None,
        )
    for faster in summary.speedups if comparable else ():
        name = faster.arm.arm
        millions, _ = PUBLISHED.get(name, (None, None))
        if millions:
            ratio = Estimate(faster.steps.ratio, faster.steps.ci95, base.seeds)
            yield Published(
                quantity=f"steps of inception over those of {name} (agrees: above 1)",
                here=in_line(ratio, number),
                source=number(PUBLISHED["inception"][0] / millions),
                agrees=(ratio.median or 0) > 1,
            )


def _source(name):
    if name in FAILED:
        return FAILED[name]
    if name not in PUBLISHED:
        return None
    millions, best = PUBLISHED[name]
    return f"{f'{millions:.1f}M' if millions else 'not reached'}, {best:.1f}"


def _agrees(arm: ArmResult, base: ArmResult, chance: float) -> bool | None:
    name, best = arm.arm, arm.max_accuracy.median or 0
    if name == "inception_x5":
        return arm.lost
    if name == "inception_sigmoid":
        return best < 2 * chance
    if name == base.arm or name not in PUBLISHED:
        return None
    above = PUBLISHED[name][1] > PUBLISHED[base.arm][1]
    return above == (best > (base.max_accuracy.median or 0))


def network_row(config: Config, size: str) -> Published:
    """What was trained, on images of which size, beside the paper's: a setting, no claim."""
    return Published(
        quantity="network: share of the channels, blocks, stem, images",
        here=f"{config.width:g}, {len(config.blocks)}, {config.stem}, {size}",
        source=f"1, {len(BLOCKS)}, imagenet, 224x224",
        claim=False,
    )


def parameter_row() -> Published:
    """How many the paper's network has, counted without computing anything."""
    model, image = full_network()
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), image)
    count = sum(v.size for v in jax.tree.leaves(shapes["params"]))
    here, source = (f"{n / 1e6:.1f}M" for n in (count, PARAMETERS))
    agrees = abs(count - PARAMETERS) < 0.05e6
    what = "parameters of the 224x224 network"
    return Published(what, here, source, agrees, PARAMETERS_REASON)


if __name__ == "__main__":
    flags.main(Config, "experiments.inception")
