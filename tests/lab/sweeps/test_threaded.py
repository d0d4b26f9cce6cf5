"""Runs on cores of their own: what they compute, when, and how it ends if one fails."""

import functools
import threading
import time

import numpy as np
import optax
import pytest
from results import timeless

from bn_jax.lab.data import batch_indices, load
from bn_jax.lab.models import CNN, MLP
from bn_jax.lab.sweeps import Budget, Point, layouts, sweep, threaded
from bn_jax.lab.sweeps.engines import VmappedSweep
from bn_jax.lab.sweeps.grid import chunks
from bn_jax.lab.sweeps.layouts import Cores, automatic
from bn_jax.lab.sweeps.programs import Traced, traced
from bn_jax.lab.sweeps.sweep import alike
from bn_jax.lab.sweeps.threaded import ThreadedRuns
from bn_jax.lab.training.run import Run
from bn_jax.linen import BatchNorm

POINTS = [Point(0.1, 1.0, 0.9), Point(0.3, 0.5, 0.5)]


@functools.cache
def digits():
    return load("digits", train_examples=300)


def build(model=MLP, features=(16,), batch=60):
    def network(swept):
        return model(features, 10, norm=functools.partial(BatchNorm, momentum=swept.momentum))

    def batches(key, first_step, num_steps):
        return batch_indices(key, first_step, num_steps, 300, batch)

    return Run(network, optax.sgd, digits().scaled, batches)


def records(points, seeds, steps=20, every=10, **options):
    found = sweep(build(), digits(), points, seeds, Budget(steps, every), **options)
    return [timeless(r) for rs in found for r in rs]


def test_a_run_does_not_depend_on_others_nor_on_the_cores(monkeypatch):
    """To the bit: alone in one program, with others, on few cores and on many."""
    (alone,) = records(POINTS[1:], (3,), parallel="single")
    for cores in (1, 2, 3):
        monkeypatch.setattr(threaded, "cores", lambda cores=cores: cores)
        found = records(POINTS, (2, 3, 4), parallel="cores")
        assert found[4] == alone
        assert len({tuple(r["test_loss"]) for r in found}) == 6


def test_is_what_is_chosen_for_small_networks_with_enough_to_do(monkeypatch):
    """And not otherwise."""
    monkeypatch.setattr("jax.device_count", lambda: 1)
    monkeypatch.setattr(layouts, "automatic", automatic)
    asked = []
    monkeypatch.setattr(Cores, "engine", lambda *args: asked.append(args))

    def chosen(steps):
        asked.clear()
        try:
            records(POINTS, (0,), steps, steps)
        except AttributeError:  # there is no engine
            assert asked
        return bool(asked)

    enough = 1 + (8 << 20) // traced(build(), digits()).bytes
    assert chosen(enough)
    assert not chosen(enough - 1)


def test_all_arms_of_a_comparison_are_trained_alike(monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 1)
    long, short = Budget(3000, 1000), Budget(3000, 1)
    assert alike("auto", digits(), [(build(), long, 3)] * 2) == "cores"
    assert alike("auto", digits(), [(build(), long, 3), (build(), short, 3)]) == "single"
    assert alike("auto", digits(), [(build(), long, 3), (build(), long, 1)]) == "cores"
    assert alike("auto", digits(), [(build(), long, 1)] * 2) == "single"
    assert alike("grid", digits(), [(build(), short, 3)]) == "grid"
    monkeypatch.setattr("jax.device_count", lambda: 8)
    assert alike("auto", digits(), [(build(), long, 3)]) == "auto"


@pytest.mark.parametrize(
    ("network", "small"),
    [
        (build(), True),
        (build(CNN, (4, 8)), True),
        (build(MLP, (4096, 4096)), False),
        (build(CNN, (256, 256), 300), False),
    ],
)
def test_what_is_small(network, small):
    assert traced(network, digits()).small(1000) is small


class Recorder:
    """An engine whose lap takes a while, and that knows who called it when."""

    seconds = 0.02

    def __init__(self, run, dataset, budget, layout, example):
        self.budget, self.called, self.lock = budget, [], threading.Lock()
        Recorder.latest = self

    def init(self, chunk):
        return 0

    def order(self, chunk, first_step):
        return first_step

    def lap(self, state, chunk, order, since):
        if order == 100:
            raise MemoryError("step 100")
        assert state == order + since  # what came before is done
        with self.lock:
            self.called.append((float(chunk.swept.learning_rate[0]), since))
        time.sleep(self.seconds)
        return state + self.budget.lap


def engine(runs, every, cores, monkeypatch, calls=1000):
    monkeypatch.setattr(threaded, "cores", lambda: cores)
    monkeypatch.setattr(Traced, "calls", lambda self, steps: calls)
    points = [Point(float(i), 1.0, 0.9) for i in range(runs)]
    (chunk,) = chunks(points, [0], runs)
    made = ThreadedRuns(Recorder, build(), digits(), Budget(10 * every, every), None, chunk)
    return made, chunk


@pytest.mark.parametrize(
    ("runs", "every", "cores", "calls", "laps"),
    [
        (70, 1000, 64, 1000, 8), (70, 1000, 64, 5, 4), (70, 1000, 64, 1, 1), (5, 20, 2, 1, 1),
        (130, 1000, 128, 1000, 20),
    ],
)  # fmt: skip
def test_no_more_laps_than_they_are_worth(runs, every, cores, calls, laps):
    assert threaded._laps(runs, cores, every, calls) == laps


@pytest.mark.parametrize(
    ("runs", "every", "cores", "laps"),
    [
        (5, 10, 2, 2), (4, 10, 2, 1), (1, 10, 2, 1), (3, 10, 8, 1), (5, 12, 4, 4), (5, 7, 2, 1),
        (7, 12, 3, 3), (6, 10, 4, 2),
    ],
)  # fmt: skip
def test_laps_are_as_few_as_keep_all_cores_at_work(runs, every, cores, laps, monkeypatch):
    made, chunk = engine(runs, every, cores, monkeypatch)
    recorder = Recorder.latest
    assert recorder.budget.laps == laps
    state = made.advance(made.init(chunk), chunk, 0)
    assert state == [every] * runs
    steps = every // laps
    assert sorted(recorder.called) == [
        (i, lap * steps) for i in range(runs) for lap in range(laps)
    ]
    # By rounds of as many as there are cores: none waits while there is something to do.
    first = [since for _, since in recorder.called[:runs]]
    assert first == [0] * runs


def test_a_failure_ends_the_sweep_and_what_has_not_begun(monkeypatch):
    made, chunk = engine(5, 10, 2, monkeypatch)
    with pytest.raises(MemoryError, match="step 100"):
        made.advance(made.init(chunk), chunk, 100)
    assert Recorder.latest.called == []


def test_an_interruption_does_not_wait_for_what_has_not_begun(monkeypatch):
    made, chunk = engine(40, 10, 2, monkeypatch)
    state = made.init(chunk)
    monkeypatch.setattr(threaded.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made._each(lambda _: Recorder.latest.lap(0, chunk, 0, 0), [(s,) for s in state])
    made._threads.shutdown()  # waits for what has begun
    assert len(Recorder.latest.called) <= 4


def test_nor_one_while_it_is_being_asked_for(monkeypatch):
    made, chunk = engine(40, 10, 2, monkeypatch)
    state, submit = made.init(chunk), made._threads.submit
    asked = []

    def stops(*args):
        asked.append(args)
        if len(asked) == 30:
            raise KeyboardInterrupt
        return submit(*args)

    monkeypatch.setattr(made._threads, "submit", stops)
    with pytest.raises(KeyboardInterrupt):
        made.advance(state, chunk, 0)
    made._threads.shutdown()
    assert len(Recorder.latest.called) <= 4


def test_runs_that_have_ended_are_left_alone(monkeypatch):
    made, chunk = engine(4, 10, 2, monkeypatch)
    going = np.array([[True], [False], [False], [True]])
    state = made.advance([20, 7, 7, 20], chunk, 20, going)
    assert state == [30, 7, 7, 30]
    assert {rate for rate, _ in Recorder.latest.called} == {0.0, 3.0}


@pytest.mark.parametrize(("model", "features"), [(MLP, (16,)), (CNN, (4, 8))])
def test_diverged_and_stopped_runs_have_the_records_of_one_program(model, features):
    points = [Point(0.3, 1.0, 0.9), Point(1e30, 1.0, 0.9), Point(1e-9, 1.0, 0.9)]
    budget, found, ended = Budget(80, 10, patience=3), [], {}
    for parallel in ("single", "cores"):

        def see(e, parallel=parallel):
            for place, point, seed in e.chunk.wanted:
                state = e.state(*place)
                ended[parallel, point, seed] = int(state.train.step), int(state.diverged_at)

        swept = sweep(
            build(model, features), digits(), points, (0, 1), budget,
            parallel=parallel, on_evaluation=see,
        )  # fmt: skip
        found.append([r for rs in swept for r in rs])
    for one, other in zip(*found, strict=True):
        for name in ("test_loss", "train_loss", "validation_accuracy"):
            a, b = getattr(one, name), getattr(other, name)
            assert [v is None for v in a] == [v is None for v in b]
            values = ([v for v in series if v is not None] for series in (a, b))
            np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)
        for name in ("diverged_at", "stopped_at", "restored"):
            assert getattr(one, name) == getattr(other, name)
    stopped = [r for r in found[1] if r.stopped_at]
    assert any(r.stopped_at < 80 for r in stopped)
    for r in stopped:  # and is not trained past that
        assert ended["cores", r.point, r.seed] == (r.stopped_at, -1)
    assert ended["cores", points[1], 0] == ended["single", points[1], 0]


def interrupted(self, timeout=None):
    raise KeyboardInterrupt


def test_reports_are_of_points_and_seeds():
    run = build()
    (chunk,) = chunks(POINTS, (0, 1, 2), 6)
    made = Cores().engine(VmappedSweep, run, digits(), Budget(10, 10), chunk)
    state = made.advance(made.init(chunk), chunk, 0)
    report = made.evaluate(state, chunk)
    assert {v.shape for v in report.values()} == {(2, 3)}
    one = VmappedSweep(run, digits(), Budget(10, 10), Cores(), next(chunks(POINTS, (0,), 1)))
    assert one.training_memory() < made.training_memory() < 3 * one.training_memory()
    for i, j in np.ndindex(2, 3):
        picked = made.pick(state, i, j)
        np.testing.assert_allclose(report["train_loss"][i, j], picked.sums.loss / 10)
