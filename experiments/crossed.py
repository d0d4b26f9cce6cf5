"""What experiments share whose arms are all combinations of some factors.

Such arms are no two sides of a comparison: they have no common baseline, and their numbers of
steps may differ. A run leaves the files that `experiments.compare` leaves; the tables and the
figures are the experiment's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from experiments.arms import Arm
from experiments.conduct import Extra, Training, conduct


def run(
    config: Any,
    arms: Mapping[str, Arm],
    *,
    experiment: str,
    question: str,
    conclude: Callable[[Training], Extra],
    watch: Callable[[str, Any], None] = lambda arm, evaluation: None,
    refusal: str | None = None,
) -> dict[str, Any]:
    """Trains the arms, fills the workdir, prints the tables; the summary comes back.

    Args:
      config: of the experiment; of its `arms` nothing is asked here.
      arms: what is trained, by name.
      experiment, question: its name, and what the page answers.
      conclude: the summary beyond the names of dataset and model, and the figures. Of its
        entries `tables` (`title`, `header`, `rows`) and `published` (as in
        `experiments.compare.Extra`) are printed.
      watch: is given every arm's `bn_jax.measure.Evaluation`s while it trains.
      refusal: arms whose layers refuse with a message that has these words are left out;
        by default that is an error.
    """

    def write(_, summary, settings, folder, figures):
        from bn_jax.report import crossed as report

        report.write(summary, settings, folder, figures)
        report.print_summary(summary)

    return conduct(
        config, arms, experiment=experiment, question=question, conclude=conclude,
        write=write, watch=watch, refusal=refusal,
    )  # fmt: skip


def best_runs(records: list[dict]) -> dict[str, list[dict]]:
    """By arm the runs, by seed, of its point with the highest median validation accuracy.

    At the last step; a run that diverged counts as 0.
    """
    points: dict[str, dict[tuple, list[dict]]] = {}
    for r in records:
        runs = points.setdefault(r["arm"], {}).setdefault(point_of(r), [])
        runs.append(r)
        runs.sort(key=lambda r: r["seed"])
    return {arm: max(own.values(), key=_typical) for arm, own in points.items()}


def point_of(record: dict) -> Any:
    """The `bn_jax.measure.Point` of a run."""
    from bn_jax.measure import Point

    return Point(*(record[field] for field in Point._fields))


def final(record: dict, metric: str = "test_accuracy") -> float:
    """At the last step; 0 where the run had diverged."""
    return record[metric][-1] or 0.0


def accuracy(
    training: Training, arm: str, split: Any, batch_size: int | None = None
) -> Callable[[dict[str, Any]], Any]:
    """From variables of an arm's network to its accuracy on a split, float32 `[]`.

    As at inference; or, with a `batch_size`, with the statistics of batches of that size, or
    of the whole split where that is smaller. Of what is left over at the end nothing counts.
    """
    import jax
    from jax import lax

    from bn_jax.training.metrics import correct
    from bn_jax.training.run import Swept

    model = training.runs[arm].model(Swept(1.0, 1.0, 0.5))
    train, examples = batch_size is not None, split.labels.size
    size = min(batch_size or examples, examples)
    count = examples // size
    batches = jax.tree.map(lambda v: v[: count * size].reshape(-1, size, *v.shape[1:]), split)

    def whole(variables):
        def one(batch):
            inputs = training.dataset.scaled(batch.inputs)
            outputs, _ = model.apply(variables, inputs, train=train, mutable=["batch_stats"])
            return correct(outputs, batch.labels).mean()

        return lax.map(one, batches).mean()

    return jax.jit(whole)


def estimate(values: list[float]) -> dict[str, Any]:
    """Their `median` and its `ci95`, a percentile bootstrap interval."""
    from bn_jax.measure.convergence import median, median_interval

    return {"median": median(values), "ci95": median_interval(values)}


def difference(a: list[float], b: list[float]) -> dict[str, Any]:
    """Median over the seeds of a - b, with its interval."""
    return estimate([x - y for x, y in zip(a, b, strict=True)])


def points_text(value: dict[str, Any]) -> str:
    """An estimate in percentage points: "+1.2 [+0.3, +2.0]"."""
    median, (low, high) = value["median"], value["ci95"]
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in (median, low, high)))


def _typical(runs):
    import statistics

    return statistics.median(final(r, "validation_accuracy") for r in runs)
