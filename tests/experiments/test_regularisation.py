"""BatchNorm, dropout and L2: the settings, the rows' rules, and a tiny run."""

import io
import json
import re
from contextlib import redirect_stdout

import numpy as np
import pytest

from bn_jax.errors import UserError
from experiments import regularisation
from experiments.reasons import reason
from experiments.regularisation import Cell, Measured


def test_the_settings():
    config = regularisation.Config()
    assert (config.dataset, config.train_examples) == ("mnist", 500)
    assert config.seeds >= 10
    assert 0.0 in config.dropouts
    assert 0.0 in config.l2s
    quick = regularisation.Config(quick=True)
    assert (quick.dataset, quick.train_examples, quick.seeds) == ("digits", 200, 10)


def test_every_combination_is_an_arm():
    # The quick size changes l2s, not what an arm says itself.
    config = regularisation.Config(quick=True, dropouts=(0.0, 0.5), l2s=(0.0, 0.1))
    arms = regularisation.arms(config)
    assert len(arms) == 2 * 2 * 2
    own = arms["bn, dropout 0.5, L2 0.1"].config(config)
    assert (own.dropout, own.l2) == (0.5, 0.1)
    assert arms["none, dropout 0, L2 0"].config(config).dropout == 0.0


def measured(test, gap):
    noise = np.linspace(-0.001, 0.001, 10)
    return Measured(0.1, [test] * 10, list(test + noise), list(gap - noise), 0)


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
def test_the_claims(none, bn, regularises, obsolete, answer):
    config = regularisation.Config(dropouts=(0.0, 0.5), l2s=(0.0,))
    first, *rows = regularisation.rows(config, of_gaps(none, bn, 0.0))
    assert first["quantity"] == "Does BatchNorm make dropout obsolete?"
    assert re.fullmatch(f"L2 0: {answer}", first["here"])
    assert first["source"] is None
    assert [row["agrees"] for row in rows] == [None, obsolete, regularises]
    change = 100 * (bn[0] - bn[1])
    assert rows[1]["here"].startswith(f"{change:+.1f} [")


def of_gaps(none, bn, l2):
    # All right on the training set: what the gap loses the test accuracy gains.
    gaps = {
        Cell(norm, dropout, l2): gap
        for norm, own in (("none", none), ("bn", bn))
        for dropout, gap in zip((0.0, 0.5), own, strict=True)
    }
    return {cell: measured(1 - gap, gap) for cell, gap in gaps.items()}


def test_the_answer_tells_the_weights_of_l2_apart():
    config = regularisation.Config(dropouts=(0.0, 0.5), l2s=(0.0, 0.001, 0.01))
    values = {}
    for l2, none in zip(config.l2s, ((0.05, 0.05), (0.1, 0.05), (0.05, 0.06)), strict=True):
        values |= of_gaps(none, (0.05, 0.05), l2)
    first, *rows = regularisation.rows(config, values)
    nothing, yes = first["here"].split("; ")
    assert nothing.startswith("L2 0, 0.01: nothing")
    assert yes.startswith("L2 0.001: yes")
    assert [row["agrees"] for row in rows[1::3]] == [None, True, None]


def test_without_the_plain_network_there_is_no_answer():
    config = regularisation.Config(arms=("bn",), dropouts=(0.0, 0.5), l2s=(0.0,))
    rows = list(regularisation.rows(config, of_gaps((0, 0), (0.05, 0.05), 0.0)))
    assert [row["agrees"] for row in rows] == [None]


def test_the_reason_holds_for_any_run():
    text = reason("regularisation", "gap with BatchNorm less that without, no dropout, L2 7")
    assert text.startswith("The interval over the seeds reaches 0 or goes beyond")
    assert "L2" not in text  # it knows nothing of other rows


def test_a_tiny_run(tmp_path):
    folder = tmp_path / "w"
    config = regularisation.Config(
        dataset="digits", train_examples=40, features=(32,), arms=("bn",), dropouts=(0.0, 0.5),
        l2s=(0.0,), learning_rates=(0.1, 0.3), seeds=2, steps=60, batch_size=20, eval_every=60,
        validation_fraction=0.1, workdir=str(folder),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as written:
        summary = regularisation.run(config)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (folder / "figures" / "accuracy_and_gap.png").exists()
    kept, dropped = summary["combinations"]
    assert (kept["dropout"], dropped["dropout"]) == (0.0, 0.5)
    # Thirty epochs of 40 examples: learnt by heart.
    assert kept["test_accuracy"]["median"] + kept["gap"]["median"] == pytest.approx(1)
    assert kept["gap"]["median"] > 0.05
    (row,) = summary["published"]
    assert row["quantity"].startswith("bn, L2 0: dropout 0.5")
    assert "agrees" in written.getvalue()
    assert "Beside the published numbers" in (folder / "report.html").read_text()


def test_what_diverged_has_no_gap(tmp_path):
    config = regularisation.Config(
        dataset="digits", train_examples=40, features=(8,), arms=("none",), dropouts=(0.0,),
        l2s=(0.0,), learning_rates=(1e30,), seeds=1, steps=4, batch_size=20, eval_every=4,
        activation="relu", workdir=str(tmp_path / "w"),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()):
        (found,) = regularisation.run(config)["combinations"]
    assert (found["diverged"], found["gap"]["median"]) == (1, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dropouts": (0.0, 1.0)}, "--dropouts: 1.0 must be at least 0 and below 1"),
        ({"l2s": (-0.1,)}, "--l2s: -0.1 must be at least 0"),
        ({"l2s": ()}, "--l2s=: name one or more"),
        ({"dropout": 0.3}, "--dropout: here --dropouts"),
        ({"l2": 0.3}, "--l2: here --l2s"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message):
        regularisation.arms(regularisation.Config(**flags))
