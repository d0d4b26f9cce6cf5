"""How far can the learning rate and the initial scale go, with and without BatchNorm?

Networks of equal layers, of several depths and activations, on scikit-learn's digits by
default: the test accuracy at every learning rate and initial scale, and the largest rate
that trains. A rate trains if the median final test accuracy is at least 90 % of `--target`.

The claim is that of Ioffe & Szegedy 2015, section 3.3: as BN(a W u) = BN(W u), a layer's
output does not depend on the scale of its weights, and larger weights have smaller gradients;
so higher rates train. The paper shows it with Inception; it has no numbers by depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from bn_jax.lab import flags
from bn_jax.lab.config import Config as CompareConfig
from bn_jax.lab.fields import fixed, flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    from bn_jax.lab.arms import Arm, chosen_arms, norm_arms
    from bn_jax.lab.experiment import Training, run_experiment
    from bn_jax.lab.findings import Findings, Published
    from bn_jax.lab.report.comparison import Outcome
    from bn_jax.lab.report.heatmap import heat_maps
    from bn_jax.lab.report.plotting import SMALL, add_legend, arm_styles, new_figure, tidy
    from bn_jax.lab.report.tables import Table
    from bn_jax.lab.report.text import number, plural
    from bn_jax.lab.statistics import Summary, summarize
if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENTRIES = ("budget_steps", "target", "arms", "by_point")
EXPERIMENT = "learning_rates"
QUESTION = "How far can the learning rate and the initial scale go, with and without BatchNorm?"
RATES_CLAIM = "higher rates train (Ioffe & Szegedy 2015, section 3.3)"
SCALES_CLAIM = "the scale of the weights matters less (section 3.3: BN(aWu) = BN(Wu))"
NO_RATE = "no rate"
DEEPEST = 1000  # layers; XLA takes minutes to compile so many
CAPTION = (
    "Largest learning rate that trains, by the number of hidden layers. At the initial scale "
    "nearest to 1. In the grey strip: no rate of the grid trains. At the dashed line, the "
    "largest rate that was tried, larger ones may train as well. Norms are moved a little "
    "sideways so that they do not hide each other."
)


@dataclasses.dataclass(frozen=True)
class Config(CompareConfig):
    """Every flag of the experiment; see `python -m experiments.learning_rates --help`."""

    QUICK: ClassVar = {
        "depths": (3, 10), "activations": ("relu", "sigmoid"), "seeds": 2, "steps": 200,
        "learning_rates": (0.01, 0.1, 1.0, 10.0, 100.0), "init_scales": (0.1, 1.0, 10.0),
    }  # fmt: skip

    depths: tuple[int, ...] = flag(
        (3, 5, 10, 20), "numbers of hidden layers", at_least=1, at_most=DEEPEST, each_once=True
    )
    activations: tuple[str, ...] = flag(
        ("relu", "sigmoid", "tanh"), "some of relu, sigmoid, tanh, elu and gelu", each_once=True
    )
    width: int = flag(32, "of every hidden layer", at_least=1)
    features: None = fixed(None)  # of --depths and --width
    activation: str | None = fixed(None)  # every arm's own
    learning_rates: tuple[float, ...] = flag(
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    )
    init_scales: tuple[float, ...] = flag(
        (0.1, 0.3, 1.0, 3.0, 10.0), "factors on the initial weights to try"
    )
    seeds: int = flag(3)
    steps: int = flag(400)
    eval_every: int = flag(200)
    target: float = flag(
        0.9, "test accuracy of which a rate has to reach 90 % to be one that trains"
    )


class Network(NamedTuple):
    """One combination."""

    norm: str
    activation: str
    depth: int

    @property
    def name(self) -> str:
        """As an arm."""
        return f"{self.norm} {self.activation} {self.depth}"


Largest = dict[Network, float | None]  # None where no rate trains
Scales = dict[Network, int]


def run(config: Config) -> dict[str, Any]:
    """Trains, fills the workdir, prints the tables; the summary comes back."""
    return run_experiment(
        config, arms(config), experiment=EXPERIMENT, question=QUESTION, conclude=conclude
    )


def networks(config: Config) -> list[Network]:
    """All combinations, those of one activation and depth side by side."""
    return [
        Network(norm, activation, depth)
        for depth in config.depths
        for activation in config.activations
        for norm in config.arms
    ]


def arms(config: Config) -> dict[str, Arm]:
    """Every network, by its name."""
    norms = chosen_arms(config.arms, norm_arms())

    def arm(network):
        return norms[network.norm]._replace(
            changes={"activation": network.activation},
            model={"features": (config.width,) * network.depth},
        )

    return {network.name: arm(network) for network in networks(config)}


def conclude(training: Training[Config]) -> Findings:
    """What of the grid trains, beside the claims."""
    config = training.config
    baseline = networks(config)[0].name
    summary = summarize(training.records, baseline=baseline, target=config.target)
    largest = {n: largest_rate(config, summary, n) for n in networks(config)}
    scales = {n: trained_scales(summary, n) for n in networks(config)}
    depth = config.depths[len(config.depths) // 2]
    shown = [n.name for n in networks(config) if n.depth == depth]
    figures = (
        ("largest_rate.png", CAPTION, largest_rates(largest, sorted(config.learning_rates))),
        ("accuracy.png", map_caption(depth, config.seeds), accuracy_maps(summary, shown)),
    )
    published = [*rate_rows(config, largest), *scale_rows(config, scales)]
    # What does not rest on a baseline.
    told = {key: v for key, v in summary.to_json().items() if key in ENTRIES}
    return Findings(told, [table(config, largest, scales)], published, figures)


def largest_rate(config: Config, summary: Summary, network: Network) -> float | None:
    """The largest that trains at the initial scale nearest to 1."""
    nearest = min(config.init_scales, key=lambda scale: max(scale, 1 / scale))
    rates = [
        p.learning_rate
        for p in summary.points
        if p.arm == network.name and p.init_scale == nearest and p.trains
    ]
    return max(rates, default=None)


def trained_scales(summary: Summary, network: Network) -> int:
    """At how many initial scales there is a rate that trains."""
    return len({p.init_scale for p in summary.points if p.arm == network.name and p.trains})


def rate_rows(config: Config, largest: Largest) -> Iterator[Published]:
    """At every depth the largest rate with and without BatchNorm, where both are trained."""
    top = max(config.learning_rates)
    for depth in _compared(config):
        pairs = {a: _pair(largest, a, depth) for a in config.activations}
        texts = [
            f"{a} {_rate(bn, top)} with, {_rate(none, top)} without"
            for a, (none, bn) in pairs.items()
        ]
        yield Published(
            quantity=f"largest rate that trains, {depth} layers",
            here="; ".join(texts),
            source=RATES_CLAIM,
            agrees=_all(_larger(none, bn, top) for none, bn in pairs.values()),
        )


def scale_rows(config: Config, scales: Scales) -> Iterator[Published]:
    """At every depth the number of initial scales that train at some rate."""
    count = len(config.init_scales)
    for depth in _compared(config) if count > 1 else ():
        pairs = {a: _pair(scales, a, depth) for a in config.activations}
        texts = [f"{a} {bn} with, {none} without" for a, (none, bn) in pairs.items()]
        yield Published(
            quantity=f"initial scales, of {count}, that train at some rate, {depth} layers",
            here="; ".join(texts),
            source=SCALES_CLAIM,
            agrees=_all(_larger(none, bn, count) for none, bn in pairs.values()),
        )


def table(config: Config, largest: Largest, scales: Scales) -> Table:
    """A row for every network."""
    top = max(config.learning_rates)
    return Table(
        "Largest learning rate that trains at the initial scale nearest to 1, and initial "
        f"scales, of {len(config.init_scales)}, that train at some rate",
        ["network", "largest rate", "initial scales"],
        [[n.name, _rate(rate, top), str(scales[n])] for n, rate in largest.items()],
    )


def _compared(config):
    return config.depths if {"none", "bn"} <= set(config.arms) else ()


def _pair(values, activation, depth):
    return tuple(values[Network(norm, activation, depth)] for norm in ("none", "bn"))


def _larger(none, bn, top):
    """Whether bn is more; None where both are at the end of what was tried."""
    return None if none == bn == top else (bn or 0) > (none or 0)


def _all(answers: Iterable[bool | None]) -> bool | None:
    answers = list(answers)
    return False if False in answers else None if None in answers else True


def _rate(rate, top):
    return NO_RATE if rate is None else f"{'at least ' * (rate == top)}{rate:g}"


def largest_rates(largest: Largest, rates: list[float]) -> Figure:
    """A panel for each activation, a line for each norm; `rates` were tried, ascending."""
    norms, activations, depths = (
        list(dict.fromkeys(values)) for values in zip(*largest, strict=True)
    )
    styles = arm_styles(norms)
    figure = new_figure(width=1 + 2.2 * len(activations), height=3.4)
    panels = figure.subplots(1, len(activations), sharey=True, squeeze=False)[0]
    place = {None: -1} | {rate: i for i, rate in enumerate(rates)}
    for ax, activation in zip(panels, activations, strict=True):
        for i, norm in enumerate(norms):
            x = [j + 0.12 * (i - (len(norms) - 1) / 2) for j in range(len(depths))]
            y = [place[largest[Network(norm, activation, depth)]] for depth in depths]
            ax.plot(x, y, label=norm, **styles[norm].line())
        ax.axhspan(-1.5, -0.5, color="#f0f0f0", zorder=0)
        ax.axhline(len(rates) - 1, color="#6b6b6b", linewidth=1, linestyle=(0, (6, 4)))
        ax.set_title(activation, fontsize=10, loc="left")
        tidy(ax, "hidden layers")
        ax.set_xticks(range(len(depths)), list(map(str, depths)))
        ax.set_xlim(-0.5, len(depths) - 0.5)
    panels[0].set_yticks(range(-1, len(rates)), ["no rate", *map(number, rates)])
    panels[0].set_ylim(-1.5, len(rates) - 0.5)
    panels[0].set_ylabel("largest learning rate that trains", fontsize=SMALL + 1)
    add_legend(figure, panels[0])
    return figure


def accuracy_maps(summary: Summary, shown: list[str]) -> Figure:
    """`heat_maps` of some of the arms."""
    arms = tuple(arm for arm in summary.arms if arm.arm in shown)
    return heat_maps(Outcome(**vars(dataclasses.replace(summary, arms=arms))))


def map_caption(depth: int, seeds: int) -> str:
    """Of `accuracy_maps`."""
    return (
        f"Final test accuracy at every learning rate and initial scale, {depth} hidden layers. "
        f"Medians over {plural(seeds, 'run')} at each point. Framed: the point of the network "
        "that reaches the target in the fewest steps or, where none does, the most accurate. "
        "Hatched: half of the runs or more diverged."
    )


if __name__ == "__main__":
    flags.main(Config, "experiments.learning_rates")
