"""One run on its own is the run that a sweep makes of the same point and seed."""

import functools

import numpy as np
import optax

from bn_jax.data import batch_indices, load
from bn_jax.linen import BatchNorm
from bn_jax.measure import Budget, Point, sweep
from bn_jax.models import MLP
from bn_jax.training.metrics import correct
from bn_jax.training.run import Run
from experiments.single import apply, train_one


def test_it_is_the_run_of_the_sweep():
    dataset = load("circles")

    def model(swept):
        return MLP((6,), 1, norm=functools.partial(BatchNorm, momentum=swept.momentum))

    def batches(key, first_step, num_steps):
        return batch_indices(key, first_step, num_steps, dataset.train.labels.size, 32)

    run = Run(model, optax.sgd, dataset.scaled, batches)
    point, seed, seen = Point(0.3, 1.0, 0.9), 4, {}
    state, swept = train_one(
        run, dataset, point._asdict(), seed, 40, every=20, see=lambda n, s: seen.update({n: s})
    )
    assert list(seen) == [0, 20, 40]
    ((record,),) = sweep(run, dataset, [point], [seed], Budget(40, 20))
    for number, accuracy in zip((0, 20, 40), record["test_accuracy"], strict=True):
        outputs = apply(run, swept, seen[number], dataset.scaled(dataset.test.inputs))
        np.testing.assert_allclose(
            np.mean(correct(outputs, dataset.test.labels)), accuracy, atol=2e-3
        )
    assert state.train.step == 40
