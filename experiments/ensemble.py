"""The mean of several networks' probabilities (Ioffe & Szegedy 2015, section 4.2.3)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bn_jax.report.text import percent
from experiments.arms import Arm, build_run
from experiments.conduct import Plan, Training

# Figure 4, 144 crops of an image: per cent of top-1 and top-5 error of one network and of six.
ONE_NETWORK, SIX_NETWORKS = (21.99, 5.82), (20.1, 4.9)


def show(
    training: Training, members: Mapping[str, tuple[Arm, Sequence[int]]], kept: Mapping
) -> tuple[list[dict], tuple[str, str, Any]]:
    """Trains the networks: rows beside figure 4's, and a figure with its name and caption.

    Args:
      training: of the arms of the experiment.
      members, kept: as in `train`.
    """
    from bn_jax.report.ensemble import CAPTION, ensemble_errors

    found, labels = train(training, members, kept), training.dataset.test.labels
    alone = [errors(p, labels) for p in found]
    together = [errors(sum(found[:k]), labels) for k in range(1, len(found) + 1)]
    figure = ensemble_errors(alone, together)
    return list(rows(alone, together[-1])), ("ensemble.png", CAPTION, figure)


def rows(alone: Sequence[Sequence[float]], together: Sequence[float]) -> Iterator[dict]:
    """Errors of one network and of all; they agree where that of all is the smaller."""
    median = [statistics.median(errors) for errors in zip(*alone, strict=True)]
    yield {
        "quantity": f"one network (median of {len(alone)}): top-1, top-5 error (%)",
        "here": ", ".join(map(percent, median)),
        "source": ", ".join(f"{e:g}" for e in ONE_NETWORK),
        "agrees": None,
    }
    yield {
        "quantity": f"{len(alone)} networks: top-1, top-5 error (%) (agrees: below)",
        "here": ", ".join(map(percent, together)),
        "source": ", ".join(f"{e:g}" for e in SIX_NETWORKS),
        "agrees": together[0] < median[0],
    }


def train(
    training: Training, members: Mapping[str, tuple[Arm, Sequence[int]]], kept: Mapping
) -> list[Any]:
    """Trains networks, and returns the probabilities of each on the test set, `[n, classes]`.

    Args:
      training: as in `show`.
      members: by name an arm and the seeds of its networks; the first of an arm's learning
        rates, initial scales and momenta counts.
      kept: where the experiment's `experiments.watchers.Weights` keeps those of `members`.
    """
    config, dataset = training.config, training.dataset
    plans = {}
    for name, (arm, seeds) in members.items():
        plan = Plan.of(config, arm, build_run(config, arm, dataset))
        plans[name] = plan._replace(points=plan.points[:1], seeds=seeds)
    training.train(plans)
    found = []
    for name, (run, (point,), seeds, _) in plans.items():
        networks = [kept[name, point, seed] for seed in seeds]
        found += probabilities(run, point, networks, dataset)
    return found


def probabilities(run: Any, point: Any, networks: Sequence[Any], dataset: Any) -> list[Any]:
    """Of the classes of the test set, by each network, from its variables: `[n, classes]`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bn_jax.training.run import Swept

    model, inputs = run.model(Swept(*point)), dataset.test.inputs

    @jax.jit
    def predict(variables, inputs):
        outputs = model.apply(variables, run.scaled(inputs), train=False)
        if outputs.shape[1] == 1:  # two classes: the logit of the second
            outputs = jnp.pad(outputs, ((0, 0), (1, 0)))
        return jax.nn.softmax(outputs)

    parts = jnp.array_split(inputs, -(-len(inputs) // 500))
    return [np.concatenate([predict(v, part) for part in parts]) for v in networks]


def errors(probabilities: Any, labels: Any) -> tuple[float, float]:
    """(top-1, top-5): the share whose label is not among the 1, or 5, most probable classes."""
    import numpy as np

    order = np.argsort(-probabilities, axis=1)
    hits = order == np.asarray(labels)[:, None]
    return tuple(1 - float(hits[:, :k].any(axis=1).mean()) for k in (1, 5))
