"""What hidden units are given, against networks written out in float64."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.data import load
from bn_jax.measure import Evaluation, Point
from bn_jax.measure.activations import Percentiles, activation_inputs, sample
from bn_jax.measure.grid import chunks
from bn_jax.models import MLP, NORMS
from bn_jax.training.run import Run

EPSILON = {"bn": 1e-5, "layer": 1e-6}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Written:
    """An MLP of sigmoids in numpy; `norms` counts those that it has gone through."""

    def __init__(self, variables, norm, places):
        self.v = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)
        self.norm, self.places, self.norms = norm, places, 0

    def normalized(self, place, x):
        if self.norm == "none" or place not in self.places:
            return x
        name = f"{'BatchNorm' if self.norm == 'bn' else 'LayerNorm'}_{self.norms}"
        self.norms += 1
        if self.norm == "bn":
            stats = self.v["batch_stats"][name]
            mean, var = stats["mean"], stats["var"]
        else:
            mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        p = self.v["params"][name]
        return (x - mean) / np.sqrt(var + EPSILON[self.norm]) * p["scale"] + p["bias"]

    def last_inputs(self, x, layers):
        x = self.normalized("input", x.reshape(len(x), -1).astype(np.float64))
        for k in range(layers):
            p = self.v["params"][f"Dense_{k}"]
            before = self.normalized("before", x @ p["kernel"] + p.get("bias", 0))
            x = self.normalized("after", sigmoid(before))
        return before


@pytest.mark.parametrize(
    ("norm", "places"),
    [
        ("none", ("before",)),
        ("bn", ("before",)),
        ("bn", ("after",)),
        ("bn", ("input", "before", "after")),
        ("layer", ("before",)),
    ],
)
def test_the_inputs_of_the_last_sigmoids(norm, places):
    model = MLP((5, 4), 3, norm=NORMS[norm], places=places, activation="sigmoid")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 2, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    variables = jax.tree.map(lambda v: rng.uniform(0.5, 1.5, v.shape).astype("f4"), shapes)
    expected = Written(variables, norm, places).last_inputs(x, 2)
    values = activation_inputs(model, variables, x)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_percentiles_of_every_run_at_every_evaluation():
    dataset = load("digits", scaling="binary")

    def model(swept):
        norm = functools.partial(NORMS["bn"], momentum=swept.momentum)
        return MLP((6,), 10, norm=norm, activation="sigmoid")

    def state(i, j):
        kernel = np.random.default_rng([i, j]).normal(size=(64, 6)).astype("f4")
        return SimpleNamespace(
            train=SimpleNamespace(
                params={
                    "Dense_0": {"kernel": kernel},
                    "BatchNorm_0": {
                        "scale": np.full(6, 2.0, "f4"),
                        "bias": np.arange(6.0, dtype="f4"),
                    },
                    "Dense_1": {"kernel": jnp.ones((6, 10)), "bias": jnp.ones(10)},
                },
                batch_stats={
                    "BatchNorm_0": {"mean": jnp.arange(6.0), "var": jnp.full(6, 3.0 + i)}
                },
            )
        )

    run = Run(model, optax.sgd, dataset.scaled, batches=None)
    points, seeds = [Point(0.1, 1.0, 0.5), Point(1.0, 1.0, 0.9)], [3, 4]
    (chunk,) = chunks(points, seeds, 4)
    watch = Percentiles()
    for step in (0, 10, 20):  # none before the first step
        seen = (run, dataset, chunk, step, 40, {}, state, step == 20, None, 0, None)
        watch("bn", Evaluation(*seen))

    assert set(watch.kept) == {("bn", point, seed) for point in points for seed in seeds}
    images = np.asarray(dataset.test.inputs)
    for (_, point, seed), paths in watch.kept.items():
        train = state(points.index(point), seeds.index(seed)).train
        values = Written(vars(train), "bn", ("before",)).last_inputs(images, 1)
        expected = [np.quantile(values, p, axis=0) for p in (0.15, 0.5, 0.85)]
        assert len(paths) == 2
        np.testing.assert_allclose(paths[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "taken"), [(3, 3), (1000, 1000), (1001, 501), (10_000, 1000)])
def test_the_sample_is_from_all_over_the_test_set(n, taken):
    images = sample(SimpleNamespace(test=SimpleNamespace(inputs=np.arange(n))))
    assert len(images) == taken
    assert len(set(np.diff(images))) == 1
    assert images[-1] + images[1] >= n
