"""Parts of experiments, against what they should be written out in NumPy or in torch."""

import dataclasses
import functools
import io
from contextlib import redirect_stdout
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from results import make_record

from bn_jax.lab import crossed
from bn_jax.lab.arms import Arm, build_run, load_data
from bn_jax.lab.comparison import Config
from bn_jax.lab.data import Split, load
from bn_jax.lab.experiment import Training
from bn_jax.lab.models import MLP, NORMS
from bn_jax.lab.statistics import summarize
from bn_jax.lab.sweeps import Evaluation, Point
from bn_jax.lab.sweeps.grid import chunks
from bn_jax.lab.training.run import Run, Swept
from bn_jax.linen import BatchNorm
from experiments import cifar_speedrun, recalibration, regularisation
from experiments import cifar_speedrun_recipe as recipe
from experiments.mnist_sigmoid_percentiles import (
    Percentiles,
    activation_inputs,
    drift,
    drift_summary,
    sample,
    typical_unit,
)

# These programs run once, for milliseconds, and take seconds to optimise.
QUICKLY = {"xla_backend_optimization_level": 0}


def test_every_image_is_seen_mirrored_in_every_other_epoch():
    examples, per_epoch = 50, 12  # batches of 4: 2 examples are left out in an epoch

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def rows(first):
        key = jax.random.key(3)
        return recipe.alternating(key, first, per_epoch // 2, examples=examples, batch_size=4)

    found = np.concatenate([rows(first) for first in range(0, 4 * per_epoch, per_epoch // 2)])
    epochs = found.reshape(4, -1)
    mirrored = np.full((4, examples), -1)
    for epoch, seen in enumerate(epochs):
        assert len(set(seen % examples)) == per_epoch * 4
        mirrored[epoch, seen % examples] = seen // examples
    for one, other, opposite in ((0, 2, 0), (1, 3, 0), (0, 1, 1), (2, 3, 1)):
        both = (mirrored[one] >= 0) & (mirrored[other] >= 0)
        assert both.sum() > 40
        assert (mirrored[one] ^ mirrored[other])[both].tolist() == [opposite] * both.sum()
    assert 10 < mirrored[0].sum() < 40


def test_images_move_by_up_to_two_pixels_in_either_direction():
    images = np.random.default_rng(0).normal(size=(300, 5, 6, 2)).astype(np.float32)
    move = jax.jit(functools.partial(recipe.translate, 2), compiler_options=QUICKLY)
    found = np.asarray(move(jax.random.key(0), images))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    moves = [
        [(padded[n, i : i + 5, j : j + 6] == image).all() for i in range(5) for j in range(5)]
        for n, image in enumerate(found)
    ]
    assert np.sum(moves, 1).tolist() == [1] * 300
    assert np.sum(moves, 0).min() > 1  # of 12 expected


def test_the_optimizer_is_that_of_torch_with_the_sum_of_the_losses():
    """Rates, weight decay and groups as the source's code gives them to torch's SGD."""
    torch = pytest.importorskip("torch")
    rng, batch, steps, frozen_at = np.random.default_rng(0), 512, 14, 9
    params = {
        "Whitening_0": {"bias": rng.normal(size=3)}, "Conv_0": {"kernel": rng.normal(size=4)},
        "BatchNorm_0": {"bias": rng.normal(size=2)},
    }  # fmt: skip
    gradients = [jax.tree.map(lambda v: rng.normal(size=v.shape), params) for _ in range(steps)]

    kilostep = 1024 * (1 + 1 / (1 - 0.85))
    rate, decay = 11.5 / kilostep, 0.0153 * batch / kilostep
    twins = jax.tree.map(lambda v: torch.tensor(v, requires_grad=True), params)
    whitening, conv, norm = (
        twins[k][n] for k, n in
        (("Whitening_0", "bias"), ("Conv_0", "kernel"), ("BatchNorm_0", "bias"))
    )  # fmt: skip
    sgd = torch.optim.SGD(
        [
            {"params": [norm], "lr": 64 * rate, "weight_decay": decay / (64 * rate)},
            {"params": [whitening, conv], "lr": rate, "weight_decay": decay / rate},
        ],
        momentum=0.85,
        nesterov=True,
    )
    peak = int(0.23 * steps)
    factors = np.interp(np.arange(steps + 1), [0, peak, steps], [0.2, 1, 0.07])
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda i: factors[i])

    tx = recipe.optimizer(
        11.5, batch_size=batch, steps=steps, frozen_at=frozen_at, weight_decay=0.0153,
        bias_rate=64.0,
    )  # fmt: skip
    update = jax.jit(tx.update)
    ours = jax.tree.map(jnp.float32, params)
    state = tx.init(ours)
    for i, mean in enumerate(gradients):
        updates, state = update(jax.tree.map(jnp.float32, mean), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        for twin, g in zip(jax.tree.leaves(twins), jax.tree.leaves(mean), strict=True):
            twin.grad = torch.tensor(g * batch)
        whitening.grad = whitening.grad if i < frozen_at else None
        sgd.step()
        schedule.step()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.detach(), rtol=1e-4, atol=1e-5),
        ours,
        twins,
    )


def test_lookahead_is_the_loop_of_the_source():
    """Beside steps of a plain run that are averaged by hand, in float64."""
    rng = np.random.default_rng(0)
    split = Split(rng.normal(size=(40, 3)).astype(np.float32), rng.integers(4, size=40))
    steps, epoch, begin = 43, 7, 20

    def model(swept, axis_name=None):
        return MLP((5,), 4, norm=BatchNorm)

    rest = (model, optax.sgd, lambda x: x, lambda *_: None)
    plain, ours = Run(*rest), recipe.Lookahead(*rest, steps=steps, epoch=epoch, begin=begin)
    key, swept = jax.random.key(0), Swept(0.3)
    step = jax.jit(plain.step, compiler_options=QUICKLY)
    look = jax.jit(ours.step, compiler_options=QUICKLY)
    fast, found = plain.init(key, swept, split.inputs), ours.init(key, swept, split.inputs)
    slow = None

    def weights(state):
        return state.train.params, state.train.batch_stats

    def back(state):
        params, stats = jax.tree.map(jnp.float32, slow)
        return state._replace(train=state.train._replace(params=params, batch_stats=stats))

    for t in range(1, steps + 1):
        rows = rng.permutation(40)[:8]
        fast, found = step(fast, swept, split, rows), look(found, swept, split, rows)
        if t > begin and t % 5 == 0:
            now = jax.tree.map(np.float64, weights(fast))
            d = 0.95**5 * (t / steps) ** 3
            slow = now if slow is None else jax.tree.map(
                lambda s, f, d=d: d * s + (1 - d) * f, slow, now
            )  # fmt: skip
            fast = back(fast)
        if slow is not None and (t % epoch == 0 or t == steps):
            fast = back(fast)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            weights(found),
            weights(fast),
        )
    assert found.train.step == steps


def test_the_training_images_are_there_twice():
    config = cifar_speedrun.Config(quick=True)
    inputs, labels = recipe.load(config).train
    np.testing.assert_array_equal(inputs[1347:], np.asarray(inputs[:1347])[:, :, ::-1])
    np.testing.assert_array_equal(labels[1347:], labels[:1347])
    assert recipe.load(config).validation.labels.shape == (1000,)
    held_out = dataclasses.replace(config, validation_fraction=0.1)
    assert recipe.load(held_out).validation.labels.shape == (135,)


EPSILON = {"bn": 1e-5, "layer": 1e-6}


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
            x = self.normalized("after", 1 / (1 + np.exp(-before)))
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


def paths(middle, spread=1.0):
    """One unit whose median goes along `middle`, the others `spread` apart, `[T, 3, 1]`."""
    middle, half = np.asarray(middle, float), np.asarray(spread) / 2 * np.ones(len(middle))
    return np.stack([middle - half, middle, middle + half], 1)[..., None]


@pytest.mark.parametrize(
    ("wandering", "expected"),
    [
        (paths([3.0] * 5), 0),
        # Of length 6 over a distance of 2, as a uniform distribution; however often one looks.
        (paths(np.linspace(0, 6, 200), 2.0), 6 / np.sqrt(12) / 2),
        (paths(np.linspace(0, 6, 3000), 2.0), 6 / np.sqrt(12) / 2),
        # Two of three percentiles go from -1 to -3 and from 1 to 3: variance 1 each.
        (paths([0.0, 0.0], [2.0, 6.0]), np.sqrt(2 / 3) / 4),
        (paths([1.0, 2.0], 0.0), np.inf),
    ],
)
def test_drift(wandering, expected):
    assert drift(wandering)[0] == pytest.approx(expected, rel=0.01)
    np.testing.assert_allclose(drift(7 * wandering - 100), drift(wandering))  # in other units


def test_the_typical_unit_has_the_median_drift():
    for drifts in ([5.0, 1.0, 3.0], [5.0, 1.0, 3.0, 4.0]):
        assert typical_unit(np.array(drifts)) == 2
    assert typical_unit(np.array([np.inf, np.inf, 1.0])) == 0


def record(arm, rate, seed, **more):
    accuracies = [0.1, 0.5, 0.9 if (arm == "bn") == (rate == 1) else 0.8]
    return make_record(arm, rate, seed, accuracies, **more)


def test_the_drift_of_a_comparison():
    """none is best at rate .1, where bn drifts as much; bn at 1, with a quarter of that."""
    records = [record(a, r, s) for a in ("none", "bn") for r in (0.1, 1) for s in range(3)]
    amount = {("none", 0.1): 4.0, ("none", 1): 8.0, ("bn", 0.1): 4.0, ("bn", 1): 1.0}
    # The drift of a step from 0 to d is d / 2; of the two other units it is far from that.
    seen = {
        (arm, Point(rate), seed): np.concatenate(
            [paths([0, d * (1 + seed)]) for d in (0.0, 2 * amount[arm, rate], 1e3)], 2
        )
        for arm, rate in amount
        for seed in range(3)
    }
    summary = summarize(records, baseline="none")
    result = drift_summary(records, summary, seen)
    none, bn = result["arms"]
    assert (none["learning_rate"], none["median"]) == (0.1, 8)
    assert none["ci95"] == [4, 12]
    assert (bn["learning_rate"], bn["median"]) == (1, 2)
    (ratio,) = result["times_smaller"]
    assert ratio == {"arm": "bn", "over": "none", "ratio": 4, "ci95": [4, 4]}
    rates = {row["arms"][0]["learning_rate"]: row for row in result["by_rate"]}
    ratios = {rate: row["times_smaller"][0]["ratio"] for rate, row in rates.items()}
    assert ratios == {0.1: 1, 1: 8}

    # Frozen where it diverged, and so without any drift.
    records[:2] = [dataclasses.replace(r, diverged_at=15) for r in records[:2]]
    seen["none", Point(0.1), 0] = seen["none", Point(0.1), 1] = paths([1.0] * 2)
    lost = drift_summary(records, summary, seen)
    assert lost["arms"][0]["median"] is None
    assert lost["times_smaller"][0]["ratio"] is None


def test_the_accuracy_with_the_statistics_of_batches():
    """Against a network in numpy, whose batches are cut here."""
    # Dropout is left out of it.
    config = Config(features=(3,), activation="tanh", dropout=0.5)
    dataset = load_data(config)
    training = Training(
        config, dataset, {"bn": build_run(config, Arm(BatchNorm), dataset)}, [], {}
    )
    rng = np.random.default_rng(0)
    first, last = rng.normal(size=(64, 3)), rng.normal(size=(3, 10))
    norm = {"scale": np.ones(3), "bias": np.zeros(3)}
    variables = jax.tree.map(
        np.float32,
        {
            "params": {
                "Dense_0": {"kernel": first},
                "BatchNorm_0": norm,
                "Dense_1": {"kernel": last, "bias": np.zeros(10)},
            },
            "batch_stats": {"BatchNorm_0": {"mean": np.full(3, 2.0), "var": np.full(3, 9.0)}},
        },
    )
    hidden = np.asarray(dataset.scaled(dataset.test.inputs), np.float64).reshape(-1, 64) @ first
    labels = np.asarray(dataset.test.labels)

    def hits(h, mean, var, labels):
        return (np.tanh((h - mean) / np.sqrt(var + 1e-5)) @ last).argmax(1) == labels

    running = crossed.accuracy(training, "bn", dataset.test)(variables)
    np.testing.assert_allclose(running, hits(hidden, 2, 9, labels).mean(), atol=1e-6)
    parts = [slice(i, i + 100) for i in range(0, 400, 100)]  # 450 examples: 50 are left over
    wanted = [hits(hidden[p], hidden[p].mean(0), hidden[p].var(0), labels[p]) for p in parts]
    batches = crossed.accuracy(training, "bn", dataset.test, 100)(variables)
    np.testing.assert_allclose(batches, np.mean(wanted), atol=1e-6)


def test_the_best_point_is_chosen_on_validation_at_the_end():
    def record(rate, seed, validation, test):
        return make_record("a", rate, seed, test, validation_accuracy=validation)

    records = [
        record(0.1, 1, [0.9, 0.5], [1.0, 1.0]), record(0.1, 0, [0.9, 0.4], [1.0, 1.0]),
        record(1.0, 0, [0.1, 0.6], [0.2, 0.3]), record(1.0, 1, [0.1, 0.7], [0.2, 0.3]),
        record(10.0, 0, [0.1, None], [0.2, None]), record(10.0, 1, [0.1, 0.9], [0.2, 0.9]),
    ]  # fmt: skip
    runs = crossed.best_runs(records)["a"]
    assert [(r.learning_rate, r.seed) for r in runs] == [(1.0, 0), (1.0, 1)]
    assert [r.final() for r in records[4:]] == [0.0, 0.9]


def test_the_error_of_statistics():
    def stats(mean, var):
        return {"bn": {"mean": jnp.array(mean), "var": jnp.array(var)}}

    # The last feature is constant: there is nothing to measure by.
    found = recalibration.statistics_error(
        stats([1.0, 2.0, 5.0], [4.0, 9.0, 0.0]), stats([0.0, 2.0, 5.0], [1.0, 4.0, 0.0])
    )
    errors = np.array([(1 - 0) / 1, 0, 2 / 1 - 1, 3 / 2 - 1])
    assert found == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-6)


def test_what_diverged_has_no_gap(tmp_path):
    config = regularisation.Config(
        dataset="digits", train_examples=40, features=(8,), arms=("none",), dropouts=(0.0,),
        l2s=(0.0,), learning_rates=(1e30,), seeds=1, steps=4, batch_size=20, eval_every=4,
        activation="relu", workdir=str(tmp_path / "w"),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()):
        (found,) = regularisation.run(config)["combinations"]
    assert (found["diverged"], found["gap"]["median"]) == (1, 0)
