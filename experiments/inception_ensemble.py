"""The mean of several networks' probabilities (Ioffe & Szegedy 2015, section 4.2.3)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.arms import Arm, build_run
from bn_jax.lab.data import Dataset
from bn_jax.lab.experiment import Plan, Training
from bn_jax.lab.findings import Published
from bn_jax.lab.report.plotting import SMALL, SPARE, STYLES, new_figure, tidy
from bn_jax.lab.report.text import percent
from bn_jax.lab.training.run import Run, Swept

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Figure 4, 144 crops of an image: per cent of top-1 and top-5 error of one network and of six.
ONE_NETWORK, SIX_NETWORKS = (21.99, 5.82), (20.1, 4.9)

CAPTION = (
    "Errors of the networks of the ensemble, each alone, and of the mean of the probabilities "
    "of the first 1, 2, 3 ... of them. Top-1: the most probable class is not the right one; "
    "top-5: nor are the four next."
)

Members = Mapping[str, tuple[Arm, Sequence[int]]]  # an arm and the seeds of its networks


def show(
    training: Training, members: Members, kept: Mapping
) -> tuple[list[Published], tuple[str, str, Figure]]:
    """Trains the networks: rows beside figure 4's, and a figure with its name and caption.

    Args:
      training: of the arms of the experiment.
      members, kept: as in `train`.
    """
    found, labels = train(training, members, kept), training.dataset.test.labels
    alone = [errors(p, labels) for p in found]
    together = [errors(np.sum(found[:k], axis=0), labels) for k in range(1, len(found) + 1)]
    figure = ensemble_errors(alone, together)
    return [*rows(alone, together[-1])], ("ensemble.png", CAPTION, figure)


def rows(alone: Sequence[Sequence[float]], together: Sequence[float]) -> Iterator[Published]:
    """Errors of one network and of all; they agree where that of all is the smaller."""
    median = [statistics.median(errors) for errors in zip(*alone, strict=True)]
    yield Published(
        quantity=f"one network (median of {len(alone)}): top-1, top-5 error (%)",
        here=", ".join(map(percent, median)),
        source=", ".join(f"{e:g}" for e in ONE_NETWORK),
    )
    yield Published(
        quantity=f"{len(alone)} networks: top-1, top-5 error (%) (agrees: below)",
        here=", ".join(map(percent, together)),
        source=", ".join(f"{e:g}" for e in SIX_NETWORKS),
        agrees=together[0] < median[0],
    )


def train(training: Training, members: Members, kept: Mapping) -> list[np.ndarray]:
    """Trains networks, and returns the probabilities of each on the test set, `[n, classes]`.

    Args:
      training: as in `show`.
      members: by name; the first of an arm's learning rates, initial scales and momenta
        counts.
      kept: where the experiment's `bn_jax.lab.watchers.Weights` keeps those of `members`.
    """
    config, dataset = training.config, training.dataset
    plans = {}
    for name, (arm, seeds) in members.items():
        plan = Plan.of(config, arm, build_run(config, arm, dataset))
        plans[name] = dataclasses.replace(plan, points=plan.points[:1], seeds=seeds)
    training.train(plans)
    found = []
    for name, plan in plans.items():
        networks = [kept[name, plan.points[0], seed] for seed in plan.seeds]
        found += probabilities(plan.run, networks, dataset)
    return found


def probabilities(
    run: Run, networks: Sequence[dict[str, Any]], dataset: Dataset
) -> list[np.ndarray]:
    """Of the classes of the test set, by each network, from its variables: `[n, classes]`."""
    model, inputs = run.model(Swept()), dataset.test.inputs

    @jax.jit
    def predict(variables, inputs):
        outputs = cast(jax.Array, model.apply(variables, run.scaled(inputs), train=False))
        if outputs.shape[1] == 1:  # two classes: the logit of the second
            outputs = jnp.pad(outputs, ((0, 0), (1, 0)))
        return jax.nn.softmax(outputs)

    parts = jnp.array_split(inputs, -(-len(inputs) // 500))
    return [np.concatenate([predict(v, part) for part in parts]) for v in networks]


def errors(probabilities: np.ndarray, labels: jax.Array) -> tuple[float, float]:
    """(top-1, top-5): the share whose label is not among the 1, or 5, most probable classes."""
    order = np.argsort(-probabilities, axis=1)
    hits = order == np.asarray(labels)[:, None]
    top_1, top_5 = (1 - float(hits[:, :k].any(axis=1).mean()) for k in (1, 5))
    return top_1, top_5


def ensemble_errors(
    alone: Sequence[Sequence[float]], together: Sequence[Sequence[float]]
) -> Figure:
    """A panel for each of top-1 and top-5.

    Args:
      alone: by network its (top-1, top-5) error.
      together: at place k those of the first k + 1 networks together.
    """
    counts = range(1, len(alone) + 1)
    figure = new_figure(width=6.4, height=3.0)
    for k, (ax, name) in enumerate(zip(figure.subplots(1, 2), ("top-1", "top-5"), strict=True)):
        single = [100 * errors[k] for errors in alone]
        mean = [100 * errors[k] for errors in together]
        look = STYLES["bn"].line() | {"clip_on": False}
        cross = {"color": SPARE[1].color, "markersize": 7, "clip_on": False, "zorder": 3}
        ax.plot(counts, single, "x", **cross, label="each network alone")
        ax.plot(counts, mean, **look, label="the first so many together")
        tidy(ax, "networks", f"{name} error on the test set (%)")
        ax.set_xticks(counts)
        ax.set_ylim(0, 1.1 * max(*single, *mean, 1e-9))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=SMALL
    )
    return figure
