"""The largest learning rate that trains, by depth, and accuracies over rate and scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bn_jax.report.heatmap import heat_maps
from bn_jax.report.plotting import SMALL, add_legend, arm_styles, new_figure, tidy
from bn_jax.report.text import number, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Largest learning rate that trains, by the number of hidden layers. At the initial scale "
    "nearest to 1. In the grey strip: no rate of the grid trains. At the dashed line, the "
    "largest rate that was tried, larger ones may train as well. Norms are moved a little "
    "sideways so that they do not hide each other."
)


def largest_rates(
    largest: dict[tuple[str, str, int], float | None], rates: list[float]
) -> Figure:
    """A panel for each activation, a line for each norm.

    Args:
      largest: by (norm, activation, number of layers); None where no rate trains.
      rates: those that were tried, ascending.
    """
    norms, activations, depths = (
        list(dict.fromkeys(values)) for values in zip(*largest, strict=True)
    )
    styles = arm_styles({"arms": [{"arm": norm} for norm in norms]})
    figure = new_figure(width=1 + 2.2 * len(activations), height=3.4)
    panels = figure.subplots(1, len(activations), sharey=True, squeeze=False)[0]
    place = {None: -1} | {rate: i for i, rate in enumerate(rates)}
    for ax, activation in zip(panels, activations, strict=True):
        for i, norm in enumerate(norms):
            x = [j + 0.12 * (i - (len(norms) - 1) / 2) for j in range(len(depths))]
            y = [place[largest[norm, activation, depth]] for depth in depths]
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


def accuracy_maps(summary: dict, shown: list[str]) -> Figure:
    """`heat_maps` of some of the arms."""
    arms = [arm for arm in summary["arms"] if arm["arm"] in shown]
    return heat_maps(summary | {"arms": arms})


def map_caption(depth: int, seeds: int) -> str:
    """Of `accuracy_maps`."""
    return (
        f"Final test accuracy at every learning rate and initial scale, {depth} hidden layers. "
        f"Medians over {plural(seeds, 'run')} at each point. Framed: the point of the network "
        "that reaches the target in the fewest steps or, where none does, the most accurate. "
        "Hatched: half of the runs or more diverged."
    )
