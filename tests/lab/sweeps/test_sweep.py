import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from results import timeless

from bn_jax.core.moments import LARGE
from bn_jax.lab.data import batch_indices, load
from bn_jax.lab.models import CNN, MLP
from bn_jax.lab.sweeps import Budget, Point, sweep, threaded
from bn_jax.lab.sweeps.engines import StepwiseSweep, VmappedSweep, prepare
from bn_jax.lab.sweeps.grid import chunks
from bn_jax.lab.sweeps.layouts import Single
from bn_jax.lab.training.run import Run, Swept, data_key, train
from bn_jax.linen import BatchNorm

BATCH = 32
BUDGET = Budget(steps=20, eval_every=10)
POINTS = [Point(0.1, 1.0, 0.9), Point(1.0, 1.0, 0.9), Point(0.1, 0.5, 0.5)]


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def build(dataset, model=MLP, features=(16,), **fields):
    def network(swept):
        norm = functools.partial(BatchNorm, momentum=swept.momentum)
        return model(features, 10, norm=norm, **fields)

    def batches(key, first_step, num_steps):
        return batch_indices(key, first_step, num_steps, dataset.train.labels.size, BATCH)

    return Run(network, optax.sgd, dataset.scaled, batches)


def records(run, dataset, points=POINTS, seeds=(0, 1), budget=BUDGET, **options):
    done = sweep(run, dataset, points, seeds, budget, **options)
    return [timeless(r) for rs in done for r in rs]


@pytest.mark.parametrize("parallel", ["single", "cores", "grid"])
@pytest.mark.parametrize("model", [MLP, CNN])
def test_every_way_gives_what_the_plain_run_gives(digits, model, parallel):
    """`train` is one scan; a grid of it is one vmap over keys and one over swept numbers."""
    fields = {"dropout": 0.1} if model is MLP else {"features": (4, 8)}
    run = build(digits, model, **fields)
    found = records(run, digits, points=POINTS[:2], parallel=parallel)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    swept = Swept(*(jnp.array(v) for v in zip(*POINTS[:2], strict=True)))
    over_seeds = jax.vmap(train, (None, 0, None, None, None))
    curves = jax.vmap(over_seeds, (None, None, 0, None, None))(run, keys, swept, digits, BUDGET)
    for i, j in np.ndindex(2, 2):
        record = found[2 * i + j]
        np.testing.assert_array_equal(record["steps"], curves.steps[i, j])
        for split in ("train", "validation", "test"):
            first = split == "train"
            loss, accuracy = (v[i, j, first:] for v in getattr(curves, split))
            tolerance = {"rtol": 1e-3, "atol": 1e-4}
            np.testing.assert_allclose(record[f"{split}_loss"][first:], loss, **tolerance)
            np.testing.assert_allclose(
                record[f"{split}_accuracy"][first:], accuracy, atol=0.004
            )


def test_same_key_same_bits_alone_or_in_company(digits):
    run = build(digits)
    together = records(run, digits)
    assert together == records(run, digits)
    alone = records(run, digits, points=POINTS[1:2], seeds=(1,))
    (same,) = [r for r in together if r["learning_rate"] == 1.0 and r["seed"] == 1]
    # Sums of another vectorisation differ in the last bits; the run is the same.
    np.testing.assert_allclose(alone[0]["test_loss"], same["test_loss"], rtol=2e-4)
    np.testing.assert_allclose(alone[0]["train_loss"][1:], same["train_loss"][1:], rtol=2e-4)


@pytest.mark.parametrize("limit", [2])
def test_chunks_do_not_change_the_records(digits, limit):
    run = build(digits)
    whole = records(run, digits, seeds=(0, 1, 2))
    parts = records(run, digits, seeds=(0, 1, 2), max_runs_at_once=limit)

    def by_run(rs):
        return sorted(rs, key=lambda r: (r["learning_rate"], r["init_scale"], r["seed"]))

    assert len(parts) == len(whole) == 9
    for a, b in zip(by_run(parts), by_run(whole), strict=True):
        assert (a["seed"], a["learning_rate"]) == (b["seed"], b["learning_rate"])
        np.testing.assert_allclose(a["test_loss"], b["test_loss"], rtol=2e-4)


def test_a_run_equals_a_plain_loop(digits):
    """The sweep against a loop written out with flax's own pieces."""
    rate, scale, momentum, seed = 0.1, 0.5, 0.5, 1
    model = MLP((16,), 10, norm=functools.partial(BatchNorm, momentum=momentum))
    key = jax.random.key(seed)
    v = model.init(
        jax.random.fold_in(key, 0), digits.scaled(digits.train.inputs[:1]), train=False
    )
    params = jax.tree.map(lambda p: p * scale if p.ndim == 2 else p, v["params"])
    stats, tx = v["batch_stats"], optax.sgd(rate)
    opt_state = tx.init(params)
    rows = batch_indices(data_key(key), 0, 20, digits.train.labels.size, BATCH)

    @jax.jit
    def step(params, stats, opt_state, rows):
        def loss_fn(p):
            x = (digits.train.inputs[rows].astype("float32") - digits.offset) * digits.factor
            variables = {"params": p, "batch_stats": stats}
            out, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
            one_hot = jax.nn.one_hot(digits.train.labels[rows], 10)
            return -(one_hot * jax.nn.log_softmax(out)).sum(-1).mean(), new["batch_stats"]

        grads, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), stats, opt_state

    for r in rows:
        params, stats, opt_state = step(params, stats, opt_state, r)
    out = model.apply(
        {"params": params, "batch_stats": stats}, digits.scaled(digits.test.inputs), train=False
    )
    log_p = np.asarray(jax.nn.log_softmax(out))
    loss = -np.mean(log_p[np.arange(450), np.asarray(digits.test.labels)])
    accuracy = np.mean(log_p.argmax(-1) == np.asarray(digits.test.labels))
    (ours,) = records(build(digits), digits, [Point(rate, scale, momentum)], (seed,))
    assert ours["test_loss"][-1] == pytest.approx(loss, rel=1e-4)
    assert ours["test_accuracy"][-1] == pytest.approx(accuracy, abs=1e-5)


def test_engines_agree(digits):
    """A convolution-free network through both; in turn is what convolutions get."""
    run = build(digits)
    (chunk,) = chunks(POINTS[:1], [3], 1)
    reports = []
    for engine_class in (VmappedSweep, StepwiseSweep):
        engine = engine_class(run, digits, BUDGET, Single(), chunk)
        state = engine.init(chunk)
        for first in (0, 10):
            state = engine.advance(state, chunk, first)
        reports.append(engine.evaluate(state, chunk))
        assert 0 < engine.state_memory() < engine.training_memory()
    for name, value in reports[0].items():
        assert value.shape == (1, 1)
        np.testing.assert_allclose(value, reports[1][name], rtol=1e-4, err_msg=name)


def test_an_engine_for_a_whole_grid(digits):
    grid = POINTS[:2], range(3)
    engine, chunk = prepare(build(digits), digits, *grid, BUDGET, "single")
    report = engine.evaluate(engine.init(chunk), chunk)
    assert {v.shape for v in report.values()} == {(2, 3)}
    with pytest.raises(ValueError, match="too many"):
        prepare(build(digits), digits, *grid, BUDGET, "single", StepwiseSweep)


@pytest.mark.parametrize(("runs", "conditions"), [(1, 1), (2, 0)])
def test_a_run_by_itself_takes_one_branch(digits, monkeypatch, runs, conditions):
    """Of the statistics of a large layer; under vmap both branches are computed."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    run = build(digits, features=(2 * LARGE // BATCH,))
    engine, _ = prepare(run, digits, POINTS[:1], range(runs), BUDGET, "single")
    assert engine._train.as_text().count(" conditional(") == conditions


def test_a_convolutional_network_learns(digits):
    run = build(digits, CNN, features=(8, 16))
    budget = Budget(steps=60, eval_every=30, eval_rows=100)
    (r,) = records(run, digits, [Point(0.3, 1.0, 0.9)], (0,), budget)
    assert r["test_accuracy"][-1] > 0.8
    assert r["train_loss"][0] is None
    assert r["train_loss"][2] < r["train_loss"][1]


class Explodes(nn.Module):
    """Logits that double until they overflow, at a step that the rate decides."""

    @nn.compact
    def __call__(self, x, *, train):
        w = self.param("kernel", nn.initializers.ones, (1, 1))
        return nn.Dense(10)(x.reshape(len(x), -1)) * w**9


def test_a_run_that_is_not_finite_is_diverged_from_then_on(digits):
    run = build(digits)
    run = Run(lambda swept: Explodes(), run.optimizer, run.scaled, run.batches)
    small, large = records(run, digits, [Point(1e-4), Point(1e3)], (0,))
    assert small["diverged_at"] is None
    assert None not in small["test_accuracy"]
    assert 0 <= large["diverged_at"] < 10
    assert large["test_accuracy"][0] is not None
    assert large["test_accuracy"][1:] == [None, None]
    assert large["train_loss"] == [None, None, None]


def test_with_64_bits_too(digits):
    """Where a user has set it, for something of his own."""
    (expected,) = records(build(digits), digits, POINTS[:1], (0,))
    with jax.enable_x64(True):
        (found,) = records(build(digits), digits, POINTS[:1], (0,))
    np.testing.assert_allclose(found["test_accuracy"], expected["test_accuracy"], atol=0.05)


class Orthogonal(nn.Module):
    """Two kernels that LAPACK makes."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(10, kernel_init=nn.initializers.orthogonal())(x.reshape(len(x), -1))
        return nn.Dense(10, kernel_init=nn.initializers.orthogonal())(x)


def test_orthogonal_weights_are_made_run_by_run(digits):
    """A batch of them may wait for threads that wait for it: two cores hung."""
    run = build(digits)
    run = Run(lambda swept: Orthogonal(), run.optimizer, run.scaled, run.batches)
    (chunk,) = chunks(POINTS[:2], (0, 1, 2), 6)
    engine = VmappedSweep(run, digits, BUDGET, Single(), chunk)
    calls = re.findall(r"= \(f32\[([\d,]+)\].* custom-call.*geqrf", engine._init.as_text())
    assert sorted(calls) == ["10,10", "64,10"]
    kernels = engine.init(chunk).train.params["Dense_0"]["kernel"]
    assert kernels.shape == (2, 3, 64, 10)
    products = np.asarray(kernels.mT @ kernels)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(10), (2, 3, 10, 10)), atol=1e-5)
    assert not np.allclose(kernels[:, 0], kernels[:, 1])


def test_a_diverged_run_keeps_the_weights_that_it_had(digits):
    run = build(digits)
    run = Run(lambda swept: Explodes(), run.optimizer, run.scaled, run.batches)
    (chunk,) = chunks([Point(1e3)], [0], 1)
    engine = VmappedSweep(run, digits, BUDGET, Single(), chunk)
    before = engine.advance(engine.init(chunk), chunk, 0)
    kept = jax.tree.map(np.array, before.train)  # a copy: the state is donated
    assert before.diverged_at.item() == kept.step.item() >= 0
    after = engine.advance(before, chunk, 10)
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, after.train))


def test_progress_adds_up(digits):
    seen = []
    records(build(digits), digits, max_runs_at_once=2, on_evaluation=seen.append)
    assert sum(e.run_steps for e in seen) == 20 * 6
    assert sum(e.last for e in seen) == 3


def test_evaluation_is_over_the_whole_split_whatever_its_chunks(digits):
    run, losses = build(digits), []
    for eval_rows in (10_000, 64):
        budget = Budget(10, 10, eval_rows=eval_rows)
        (r,) = records(run, digits, POINTS[:1], (0,), budget)
        losses.append(r["test_loss"])
    np.testing.assert_allclose(losses, [losses[0]] * 2, rtol=1e-5)


def test_steps_that_evaluations_do_not_divide_are_refused(digits):
    with pytest.raises(ValueError, match="eval_every 7 does not divide the 20 steps"):
        records(build(digits), digits, budget=Budget(20, 7))


@pytest.mark.parametrize("done", [{(0, 0), (0, 1)}, {(0, 0), (1, 0), (1, 1)}, {(1, 0)}])
def test_chunks_that_are_done_are_passed_over(digits, done):
    """Those of which a run is missing are trained whole; all others are as they were."""
    run, options = build(digits), {"points": POINTS[:2], "seeds": (0, 1)}
    whole = records(run, digits, max_runs_at_once=2, **options)
    seen = []
    rest = records(
        run, digits, max_runs_at_once=2, on_evaluation=lambda e: seen.append(e.number),
        done=lambda point, seed: (POINTS.index(point), seed) in done, **options,
    )  # fmt: skip
    chunks = [{(i, 0), (i, 1)} for i in range(2)]
    left = [i for i, chunk in enumerate(chunks) if not chunk <= done]
    assert {*seen} == {*left}
    assert rest == [r for i in left for r in whole[2 * i : 2 * i + 2]]
    assert records(run, digits, done=lambda point, seed: True, **options) == []


@pytest.mark.parametrize(
    ("parallel", "left"), [("single", 3), ("cores", 3), ("grid", 4), ("jit", 3)]
)
def test_a_sweep_goes_on_where_it_was(digits, parallel, left, monkeypatch):
    """From the second chunk, after the first of its two evaluations, to the same bits."""
    monkeypatch.setattr(threaded, "cores", lambda: 2)
    run, seen = build(digits), []
    options = {"points": POINTS[:2], "seeds": (0, 1), "max_runs_at_once": 1}
    options["parallel"] = parallel

    def see(e):
        at = e.underway
        kept = at._replace(state=jax.tree.map(jnp.copy, at.state), history=[*at.history])
        seen.append((e.number, kept))

    whole = records(run, digits, on_evaluation=see, **options)
    where = next(i for i, (number, at) in enumerate(seen) if number == (parallel != "grid"))
    number, underway = seen[where + 1]
    assert underway.done == 10
    rest = records(run, digits, first=number, resume=lambda state: underway, **options)
    assert rest == whole[-len(rest) :]
    assert len(rest) == left
