"""What looks on while runs train: each run's states are those that its record is of."""

import functools

import numpy as np
import optax
import pytest

from bn_jax.data import batch_indices, load
from bn_jax.linen import BatchNorm
from bn_jax.measure import Budget, Point, sweep
from bn_jax.models import MLP
from bn_jax.training.metrics import correct
from bn_jax.training.run import Run, Swept
from experiments.single import train_one
from experiments.watchers import Weights


def accuracy(run, point, variables, dataset):
    outputs = run.model(Swept(*point)).apply(
        variables, dataset.scaled(dataset.test.inputs), train=False
    )
    return np.mean(correct(outputs, dataset.test.labels))


@pytest.mark.long
def test_states_on_the_way_are_those_of_the_record():
    dataset = load("circles")

    def model(swept):
        return MLP((6,), 1, norm=functools.partial(BatchNorm, momentum=swept.momentum))

    def batches(key, first_step, num_steps):
        return batch_indices(key, first_step, num_steps, dataset.train.labels.size, 32)

    run = Run(model, optax.sgd, dataset.scaled, batches)
    point, budget, seen, kept = Point(0.3, 1.0, 0.9), Budget(40, 20), {}, Weights()
    train_one(run, dataset, point, 4, budget, see=lambda n, s: seen.update({n: s.train}))
    assert list(seen) == [0, 20, 40]
    grid = [Point(0.1, 1.0, 0.9), point], [3, 4]
    (found,) = sweep(run, dataset, *grid, budget, on_evaluation=lambda e: kept("bn", e))
    record = found[-1]
    for number, expected in zip((0, 20, 40), record["test_accuracy"], strict=True):
        variables = {"params": seen[number].params, "batch_stats": seen[number].batch_stats}
        np.testing.assert_allclose(
            accuracy(run, point, variables, dataset), expected, atol=2e-3
        )
    assert seen[40].step == 40
    assert len(kept.kept) == 4
    for record in found:
        at = Point(*(record[f] for f in Point._fields))
        measured = accuracy(run, at, kept.kept["bn", at, record["seed"]], dataset)
        np.testing.assert_allclose(measured, record["test_accuracy"][-1], atol=2e-3)
