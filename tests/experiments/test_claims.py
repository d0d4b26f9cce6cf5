"""What a run says of its source's claims, from records and summaries made by hand."""

import dataclasses
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from results import make_arm, make_record, make_summary, sure
from test_settings import CIFAR

from bn_jax.lab.arms import build_run
from bn_jax.lab.data import Split
from bn_jax.lab.experiment import Training
from bn_jax.lab.statistics import Seconds
from bn_jax.lab.statistics.convergence import Ratio, mean_interval
from experiments import (
    batch_size,
    cifar_cnn,
    cifar_speedrun,
    circles,
    first_layer,
    inception,
    inception_ensemble,
    learning_rates,
    lstm,
    make_report,
    mnist_sigmoid,
    regularisation,
)
from experiments.cifar_speedrun_figure import Measured
from experiments.learning_rates import Network
from experiments.regularisation import Cell

NOISE = np.linspace(-0.001, 0.001, 10)


def judged(rows):
    return [row.agrees for row in rows]


@pytest.mark.parametrize(
    ("flags", "epochs", "agrees"),
    [({}, "20 [20, 20]", True), ({"batch_size": 64, "steps": 705}, "43 [43, 43]", None)],
)
def test_circles(flags, epochs, agrees):
    """Epochs are those of the run; only the source's setting is judged."""
    summary = make_summary(make_arm(steps_to_target=sure(300)))
    record = make_record(accuracy=[0.848], validation_accuracy=[0.846])
    half = Split(jnp.zeros((500, 2)), jnp.zeros(500, int))
    dataset = CIFAR._replace(train=half, num_classes=2)
    training = Training(circles.Config(**flags), dataset, {}, [record], {}, summary)
    accuracy, to_target, setting = circles.rows(training)
    assert to_target.here.startswith(epochs)
    assert (accuracy.agrees, to_target.agrees) == (agrees, agrees)
    assert "agrees" not in setting.to_json()


@pytest.mark.parametrize(
    ("accuracy", "flags", "agrees"),
    [(0.88, {}, True), (0.84, {}, False), (0.88, {"epochs": 2}, None)],
)
def test_cifar_cnn(accuracy, flags, agrees):
    """An accuracy agrees within two points, at full size."""
    config = dataclasses.replace(cifar_cnn.Config(network="b", **flags), eval_every=1)
    summary = make_summary(make_arm(max_accuracy=sure(accuracy)))
    run = make_record(steps=[0, 1, 2], accuracy=[0.1, 0.5, 0.4])
    best, epochs = cifar_cnn.accuracies(Training(config, CIFAR, {}, [run], {}, summary))
    assert (best.source, best.agrees) == ("87%", agrees)
    assert ("2 epochs" in best.here) == (agrees is None)
    assert epochs.here == "2, 1"


def test_the_parameters_of_network_a():
    config = cifar_cnn.Config(arms=("bn",))
    one = build_run(config, cifar_cnn.arms(config)["bn"], CIFAR)
    (row,) = cifar_cnn.counts(Training(config, CIFAR, {"bn": one}, [], {}))
    assert row.here == "1,404,970 + 1,920 = 1,406,890"
    assert row.agrees


def test_curves_of_epochs_end_where_a_run_stopped():
    run = make_record(
        "none",
        steps=[0, 10, 20, 30, 40],
        stopped_at=20,
        seconds=Seconds(0.5),
        train_loss=[None, 2.0, 1.0, None, None],
        train_accuracy=[None, 0.2, 0.3, None, None],
        validation_loss=[2.3, 2.1, 1.5, 2.1, 2.1],
        accuracy=[0.1, 0.4, 0.35, 0.4, 0.4],
    )
    config = dataclasses.replace(cifar_cnn.Config(), eval_every=10)
    training = Training(
        config, CIFAR, {"none": None}, [run], {}, make_summary(make_arm("none"))
    )
    loss, by_time, accuracy, _ = (
        {line.get_label(): line.get_xydata() for line in ax.lines}
        for ax in cifar_cnn.epoch_curves(training).axes
    )
    np.testing.assert_allclose(loss["none, validation"], [[1, 2.1], [2, 1.5]])
    np.testing.assert_allclose(loss["none, training"], [[1, 2], [2, 1]])
    np.testing.assert_allclose(by_time["none, training"], [[5, 2], [10, 1]])
    np.testing.assert_allclose(accuracy["none, validation"], [[1, 40], [2, 35]])


@pytest.mark.parametrize(
    ("value", "flags", "agrees"),
    [(0.9395, {}, True), (0.93, {}, False), (0.9395, {"steps": 238}, None)],
)
def test_cifar_speedrun(value, flags, agrees):
    arms = [
        Measured(make_arm(name), [value], sure(value), 9.917, sure(9.0), sure(4.0))
        for name in ("bn", "none")
    ]
    rows = [*cifar_speedrun.rows(cifar_speedrun.Config(**flags), arms)]
    assert [row.to_json().get("agrees", "setting") for row in rows] == [
        agrees, "setting", "setting",
    ]  # fmt: skip
    assert [row.here.split("%")[0] for row in rows] == [f"{100 * value:.2f}", "9.9", "4"]


def test_the_mean_and_the_seconds_of_short_runs():
    values = [*np.random.default_rng(0).normal(0.94, 0.0014, size=50)]
    wide = 1.96 * np.std(values) / np.sqrt(50)
    ends = np.array(mean_interval(values)) - np.mean(values)
    np.testing.assert_allclose(ends, [-wide, wide], rtol=0.1)
    # Of training and one evaluation.
    record = make_record(seconds=Seconds(1.0, training=2.0, evaluation=1.5))
    assert cifar_speedrun.run_seconds(record) == 2.5


def test_the_best_with_batch_norm_is_folded():
    """By accuracy, whatever place it has."""
    arms = [
        make_arm(name, momentum=momentum, max_accuracy=sure(best))
        for name, momentum, best in (
            ("none", None, 0.99), ("bn_before", 0.9, 0.95), ("bn_after", 0.9, 0.97),
        )
    ]  # fmt: skip
    assert first_layer.best_normed(make_summary(*arms)).arm == "bn_after"
    assert first_layer.best_normed(make_summary(arms[0])) is None


def of_lstm(none, recurrent, steps, ci95=None):
    arms = [
        make_arm(arm, max_accuracy=sure(best))
        for arm, best in (("none", none), ("recurrent_.1", recurrent))
    ]
    return make_summary(*arms, ratios=[Ratio(steps, tuple(ci95 or (steps, steps)))])


@pytest.mark.parametrize(
    ("ratio", "ci95", "agrees"),
    [
        (2.0, [1.5, None], True),
        (1.4, [0.9, None], None),  # may be chance
        (1.4, [None, None], None),
        (1.0, [1.0, 1.0], False),
        (None, [0.0, None], False),
    ],
)
def test_an_lstm_is_faster_by_more_than_chance(ratio, ci95, agrees):
    summary = of_lstm(0.5, 0.5, ratio, ci95)
    assert judged(lstm.rows(lstm.Config(read="pixels"), summary, {}))[-1] is agrees
    assert judged(lstm.rows(lstm.Config(read="rows"), summary, {}))[-1] is None


@pytest.mark.parametrize(("steps", "expected"), [(100_000, [True, False]), (200, [None] * 2)])
def test_accuracies_of_an_lstm_are_judged_at_the_sources_size_alone(steps, expected):
    config = lstm.Config(read="pixels", permuted=True, steps=steps)
    rows = [*lstm.rows(config, of_lstm(0.902, 0.99, 0.5), {})]
    assert [row.source for row in rows[:2]] == ["90.2", "95.4"]
    assert judged(rows) == [*expected, False]


@pytest.mark.parametrize(
    ("small", "large", "agrees"),
    [
        (0.5, 1e-6, [True, True]),
        (3.71, 9.8e6, [True, False]),
        (0.11, 0.09, [True, True]),
        (20.0, 0.5, [False, False]),  # one may be nearer 1 than the other, and not near
        (1e-3, 1e-2, [False, True]),
        (0.5, None, [True, None]),
    ],
)
def test_what_the_gradient_loses_on_its_way_through_an_lstm(small, large, agrees):
    first = {"recurrent_.1": small, "recurrent_1": large, "none": 0.5}
    norms = {arm: {"start": [norm, 5.0, 1.0]} for arm, norm in first.items()}

    def rows(read):
        return [*lstm.rows(lstm.Config(read=read), of_lstm(0.5, 0.5, 2.0), norms)][3:]

    assert judged(rows("pixels")) == [*agrees, None]
    assert judged(rows("rows")) == [None] * 3
    grows = [bool(norm and norm > 1) for norm in first.values()]
    assert [row.reason is not None for row in rows("pixels")] == grows


def of_inception(**arms):
    """A summary of arms with (best, steps to the target, diverged); the first is the base."""
    (first, base, _), *others = arms.values()
    results = [
        make_arm(
            arm, seeds=1, diverged=lost, steps_to_target=sure(steps), max_accuracy=sure(best)
        )
        for arm, (best, steps, lost) in arms.items()
    ]
    ratios = [steps and base / steps for _, steps, _ in others]
    return make_summary(*results, target=first, ratios=ratios)


@pytest.mark.parametrize(
    ("arm", "found", "agrees"),
    [
        ("bn_x5", (0.7, 100, 0), [True, True]),
        ("bn_x5", (0.5, None, 0), [False, False]),
        ("bn_x30", (0.61, 2000, 0), [True, False]),
        ("bn_x5_sigmoid", (0.5, None, 0), [True]),
        ("bn_x5_sigmoid", (0.7, 100, 0), [False]),
        ("inception_x5", (0.7, 100, 0), [False]),
        ("inception_x5", (0.1, None, 1), [True]),
        ("inception_sigmoid", (0.11, None, 0), [True]),
        ("inception_sigmoid", (0.4, None, 0), [False]),
        ("layer", (0.4, None, 0), [None]),
    ],
)
def test_directions_of_inception_are_compared(arm, found, agrees):
    summary = of_inception(inception=(0.6, 1000, 0), **{arm: found})
    assert judged(inception.rows(summary, 0.1)) == [None, *agrees]
    # Nothing is compared over another baseline.
    summary = of_inception(none=(0.6, 500, 0), **{arm: found})
    assert {*judged(inception.rows(summary, 0.1))} == {None}


def test_the_published_numbers_of_inception():
    x5, x30 = (0.6, 500, 0), (0.7, 100, 0)
    summary = of_inception(inception=(0.6, 1000, 0), bn_x5=x5, bn_x30=x30)
    sources = [row.source for row in inception.rows(summary, 0.1)]
    assert sources == ["31.0M, 72.2", "2.1M, 73.0", "2.7M, 74.8", "14.8", "11.5"]
    row = inception.parameter_row()
    assert (row.here, row.source, row.agrees) == ("11.2M", "13.6M", False)


def test_the_errors_of_an_ensemble():
    labels = np.array([0, 1, 2, 6])
    probabilities = np.tile([0.3, 0.2, 0.15, 0.13, 0.12, 0.06, 0.04], (4, 1))
    assert inception_ensemble.errors(probabilities, labels) == (0.75, 0.25)
    rows = [*inception_ensemble.rows([(0.5, 0.2), (0.3, 0.1), (0.4, 0.1)], (0.35, 0.1))]
    assert [row.here for row in rows] == ["40.0, 10.0", "35.0, 10.0"]
    assert judged(rows) == [None, True]


@pytest.mark.parametrize(("better", "agrees"), [(True, [True] * 3), (False, [False] * 3)])
def test_batch_size(better, agrees):
    typical = (0.95, 0.6, 0.8, 0.95, 0.945, 0.9) if better else (0.6, 0.95, 0.9, 0.95, 0.9, 0.8)
    cells = [("bn", 32), ("bn", 2), ("bn", 4), ("group", 32), ("group", 2), ("renorm", 4)]
    accuracies = {
        batch_size.Cell(*cell): [*(value + NOISE)]
        for cell, value in zip(cells, typical, strict=True)
    }
    rows = [*batch_size.rows(accuracies)]
    assert judged(rows) == agrees
    assert [row.source.split(" ")[0] for row in rows] == ["+11.1", "+0.0", "+2.3"]
    if better:
        assert [row.here.split(" ")[0] for row in rows] == ["+35.0", "+0.5", "+10.0"]


@pytest.mark.parametrize(
    ("none", "bn", "agrees"),
    [
        ((0.1, 0.1), (1.0, 10.0), True),
        ((None, 0.1), (0.1, 1.0), True),
        ((0.1, 1.0), (1.0, 1.0), False),
        ((0.1, None), (1.0, None), False),
        ((10.0, 0.1), (10.0, 1.0), None),  # both at the end of the grid: who knows
        ((10.0, 1.0), (10.0, 0.1), False),
    ],
)
def test_learning_rates(none, bn, agrees):
    """A rate is larger with BatchNorm for every activation, or not."""
    config = learning_rates.Config(
        depths=(3,), activations=("relu", "tanh"), learning_rates=(0.1, 1.0, 10.0)
    )
    largest = {
        Network(norm, activation, 3): rate
        for norm, rates in (("none", none), ("bn", bn))
        for activation, rate in zip(config.activations, rates, strict=True)
    }
    assert judged(learning_rates.rate_rows(config, largest)) == [agrees]


def test_what_is_read_off_a_grid_of_rates_and_scales():
    config = learning_rates.Config(init_scales=(0.1, 1.0, 4.0))
    network, absent = Network("bn", "relu", 3), Network("none", "relu", 3)
    points = [
        make_arm(arm.name, rate, init_scale=scale, trains=trains)
        for arm, rate, scale, trains in (
            (network, 0.1, 1.0, True), (network, 1.0, 1.0, True), (network, 10.0, 1.0, False),
            (network, 10.0, 4.0, True), (Network("bn", "relu", 5), 10.0, 1.0, True),
        )
    ]  # fmt: skip
    summary = make_summary(make_arm(), points=points)
    assert learning_rates.largest_rate(config, summary, network) == 1.0
    assert learning_rates.trained_scales(summary, network) == 2
    assert learning_rates.largest_rate(config, summary, absent) is None
    assert learning_rates.trained_scales(summary, absent) == 0


def of_gaps(none, bn, l2):
    """Networks all right on the training set: what the gap loses the test accuracy gains."""
    return {
        (cell := Cell(norm, dropout, l2)): regularisation.Measured(
            cell, 0.1, [0] * 10, [*(1 - g + NOISE)], [*(g - NOISE)], 0
        )
        for norm, own in (("none", none), ("bn", bn))
        for dropout, g in zip((0.0, 0.5), own, strict=True)
    }


@pytest.mark.parametrize(
    ("none", "bn", "regularises", "obsolete", "answer"),
    [  # The gap without dropout, and with it.
        ((0.10, 0.05), (0.05, 0.05), True, True, "yes, .* not with it"),
        ((0.10, 0.05), (0.05, 0.07), True, True, "yes, .* not with it"),
        ((0.10, 0.05), (0.05, 0.02), True, False, "no, .* too"),
        ((0.05, 0.05), (0.10, 0.05), False, False, "no, .* not without it"),
        ((0.05, 0.08), (0.10, 0.10), False, None, "nothing to make obsolete, .*"),
        ((0.05, 0.05), (0.10, 0.12), False, None, "nothing to make obsolete, .*"),
    ],
)  # fmt: skip
def test_regularisation(none, bn, regularises, obsolete, answer):
    config = regularisation.Config(dropouts=(0.0, 0.5), l2s=(0.0,))
    first, *rows = regularisation.rows(config, of_gaps(none, bn, 0.0))
    assert re.fullmatch(f"L2 0: {answer}", first.here)
    assert judged(rows) == [None, obsolete, regularises]
    assert rows[1].here.startswith(f"{100 * (bn[0] - bn[1]):+.1f} [")
    alone = dataclasses.replace(config, arms=("bn",))
    assert judged(regularisation.rows(alone, of_gaps((0, 0), (0.05, 0.05), 0.0))) == [None]


def test_the_answer_tells_the_weights_of_l2_apart():
    config = regularisation.Config(dropouts=(0.0, 0.5), l2s=(0.0, 0.001, 0.01))
    values = {}
    for l2, none in zip(config.l2s, ((0.05, 0.05), (0.1, 0.05), (0.05, 0.06)), strict=True):
        values |= of_gaps(none, (0.05, 0.05), l2)
    first, *rows = regularisation.rows(config, values)
    assert re.fullmatch("L2 0, 0.01: nothing.*; L2 0.001: yes.*", first.here)
    assert judged(rows[1::3]) == [None, True, None]


@pytest.mark.parametrize(
    ("low", "expected"), [(2.1, True), (2.0, False), (0.5, False), (None, True)]
)
def test_a_claim_of_mnist_sigmoid_needs_the_whole_interval(low, expected):
    assert mnist_sigmoid.above({"ratio": 3.0, "ci95": [low, 4.0]}, 2) is expected


@pytest.mark.parametrize(
    ("by_rate", "found"),
    [
        ([(1.76, 0.1), (1.03, 3.0), (1.22, 1.0)], "1.76 at rate 0.1, 1.03 at rate 3"),
        ([(0.8, 0.1, 2.0), (None, 1.0), (2.5, 3.0)], "2.5 at rate 3, 0.8 at rate 0.1, scale 2"),
        ([(1.1, 0.1)], None),
    ],
)
def test_the_reason_of_mnist_sigmoid_is_read_off_the_run(by_rate, found):
    def block(ratio, rate, scale=1.0):
        times = [{"ratio": ratio, "ci95": [None, None]}]
        arms = [{"learning_rate": rate, "init_scale": scale}]
        return {"arms": arms, "times_smaller": times}

    more = f", and the ratio depends on it: {found}" if found else ""
    reason = mnist_sigmoid.reason({"by_rate": [block(*one) for one in by_rate]}, 1)
    assert reason == f"The paper does not state its learning rate{more}."


def test_the_claims_of_mnist_sigmoid():
    records = [
        make_record(arm, seed=seed, accuracy=[0.1, last])
        for arm, last in (("none", 0.9), ("bn", 0.95))
        for seed in (0, 1)
    ]
    arms = [make_arm(a, steps_to_target=sure(s)) for a, s in (("none", 400), ("bn", 100))]
    summary = make_summary(*arms, target=0.9, ratios=[Ratio(4.0, (2.0, 8.0))])
    at = {"learning_rate": 0.1, "init_scale": 1.0}
    block = {"arms": [at | {"median": 8.0}, at | {"median": 2.0}]}
    block["times_smaller"] = [{"ratio": 4.0, "ci95": [1.5, 9.0]}]
    drift = block | {"first_tenth": block, "by_rate": [block]}
    for config, agrees in (
        (mnist_sigmoid.Config(), [True, True, False, None, None]),
        (mnist_sigmoid.Config(steps=500), [None] * 5),
    ):
        rows = [*mnist_sigmoid.rows(Training(config, CIFAR, {}, records, {}, summary), drift)]
        assert judged(rows) == agrees
        assert [row.reason is not None for row in rows] == [False, False, True, False, False]


def test_reasons_are_found_by_the_beginning_of_a_quantity():
    gap = "gap with BatchNorm less that without, no dropout, L2 7"
    assert make_report.reason("regularisation", gap).startswith("The interval over the seeds")
    assert make_report.reason("regularisation", f"no {gap}") is None


def test_progress_counts_steps_or_epochs():
    from bn_jax.lab.training.metrics import correct
    from bn_jax.lab.watchers import note

    report = {"train_loss": 0.5, "validation_accuracy": 0.25, "diverged_at": -1}
    report = {k: np.full((1, 1), v) for k, v in report.items()}
    evaluation = SimpleNamespace(step=30, report=report, run=SimpleNamespace(metric=correct))
    assert note(evaluation, 10) == "epoch 3, loss 0.5, validation accuracy 25.0%"
    assert note(evaluation) == "step 30, loss 0.5, validation accuracy 25.0%"
