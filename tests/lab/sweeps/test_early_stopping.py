"""Runs that stop early, and go back to their best; dropout and augmentation in a sweep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.lab.data import batch_indices, load
from bn_jax.lab.models import MLP
from bn_jax.lab.sweeps import Budget, Point, sweep
from bn_jax.lab.training.run import Run
from bn_jax.lab.watchers import Weights


@functools.cache
def digits():
    return load("digits", train_examples=200)


def build(features=(8,), **fields):
    def batches(key, first_step, num_steps):
        return batch_indices(key, first_step, num_steps, 200, 20)

    return Run(lambda swept: MLP(features, **fields), optax.sgd, digits().scaled, batches)


@pytest.mark.parametrize(
    ("accuracies", "patience", "stop"),
    [
        ([0.1, 0.2, 0.3, 0.2], 2, None),
        ([0.1, 0.3, 0.2, 0.2, 0.9], 2, (3, 1)),
        ([0.1, 0.3, 0.3, 0.2, 0.9], 2, (3, 1)),  # equal is no better
        ([0.1, 0.3, 0.2, 0.4, 0.3, 0.3], 2, (5, 3)),
        ([0.5, 0.1], 1, (1, 0)),
        ([0.1, 0.3, 0.2, 0.2, 0.9], None, None),
    ],
)
def test_when_to_stop(accuracies, patience, stop):
    assert Budget(10, 1, patience).stop(accuracies) == stop


def test_a_stopped_run_has_the_numbers_of_its_best_evaluation():
    dataset = digits()
    # A rate of 0 gets no better; seeds differ in when they last do.
    points, seeds, seen = [Point(1e-9), Point(0.3)], (0, 1), []
    run = build()
    plain, stopped = (
        next(sweep(run, dataset, points, seeds, Budget(120, 10, patience), on_evaluation=f))
        for patience, f in ((None, lambda e: None), (2, seen.append))
    )
    for whole, early in zip(plain, stopped, strict=True):
        found = Budget(120, 10, 2).stop(whole.validation_accuracy)
        if found is None:
            assert early.stopped_at is None
            continue
        last, best = found
        assert (early.stopped_at, early.restored) == (10 * last, 10 * best)
        for name in ("validation_accuracy", "test_accuracy", "test_loss"):
            np.testing.assert_allclose(
                getattr(early, name)[: last + 1], getattr(whole, name)[: last + 1], rtol=1e-4
            )
            assert set(getattr(early, name)[last + 1 :]) <= {getattr(early, name)[best]}
        assert not any(early.train_loss[last + 1 :])
    assert stopped[0].stopped_at == 20
    assert sum(e.run_steps for e in seen) == 120 * 4


def test_the_weights_that_are_kept_are_those_a_run_goes_back_to():
    dataset, run, weights = digits(), build(), Weights(lambda arm, seed: seed == 1)
    points, budget, steps = [Point(1e-9), Point(0.3), Point(3.0)], Budget(120, 10, 2), {}

    def watch(evaluation):
        weights("bn", evaluation)
        for place, point, seed in evaluation.chunk.wanted:
            steps[point, seed, evaluation.step] = evaluation.state(*place).train.params

    records = next(sweep(run, dataset, points, (0, 1), budget, on_evaluation=watch))
    assert set(weights.kept) == {("bn", point, 1) for point in points}
    assert {r.restored for r in records if r.seed == 1} > {0}
    for point, record in zip(points, records[1::2], strict=True):
        step = 120 if record.restored is None else record.restored
        kept = weights.kept["bn", point, 1]["params"]
        jax.tree.map(np.testing.assert_array_equal, kept, steps[point, 1, step])


def test_a_sweep_ends_when_its_last_run_stops():
    dataset = digits()
    seen, run = [], build()
    budget = Budget(1000, 10, 2)
    next(sweep(run, dataset, [Point(1e-9)], (0, 1), budget, on_evaluation=seen.append))
    assert [e.step for e in seen] == [0, 10, 20]
    assert seen[-1].last
    assert sum(e.run_steps for e in seen) == 2000


def test_dropout_and_augmentation_are_for_training_alone():
    dataset = digits()
    plain = build()
    dropped = build(dropout=0.5)
    blank = dataclasses.replace(plain, augment=lambda key, images: jnp.zeros_like(images))

    def record(run, rate):
        return next(sweep(run, dataset, [Point(rate)], [0], Budget(10, 10)))[0]

    # Without learning, evaluation is that of the same weights.
    still = record(plain, 1e-12)
    for run in (dropped, blank):
        found = record(run, 1e-12)
        np.testing.assert_allclose(found.test_loss, still.test_loss, rtol=1e-5)
        assert abs(found.train_loss[1] - still.train_loss[1]) > 1e-3
    assert record(dropped, 0.1).train_loss == record(dropped, 0.1).train_loss
