"""The experiment on recalibration at a tiny size, and its measures against NumPy."""

import io
import json
import os
from contextlib import redirect_stdout

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.report import read_records
from experiments import recalibration

RECALIBRATION = """
from experiments import recalibration, flags
flags.main(recalibration.Config, recalibration.run)
"""
LEFT = ["config.json", "figures", "records.jsonl", "report.html", "summary.json"]
TINY = {
    "dataset": "digits", "model": "mlp", "features": (8,), "steps": 6, "seeds": 2,
    "images": (20, 60), "recalibration_batch": 30,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Summary, output, folder."""
    folder = tmp_path_factory.mktemp("recalibration") / "w"
    with redirect_stdout(io.StringIO()) as written:
        summary = recalibration.run(recalibration.Config(**TINY, workdir=str(folder)))
    return summary, written.getvalue(), folder


def test_what_it_leaves(finished):
    summary, written, folder = finished
    assert sorted(os.listdir(folder)) == LEFT
    assert os.listdir(folder / "figures") == ["recalibration.png"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    table, _, page = written.rstrip().rpartition("\n")
    assert page == str(folder / "report.html")
    for text in ("training (running)", "20 images", "60 images", "average of the weights"):
        assert text in table
        assert text in (folder / "report.html").read_text()


def test_the_summary_is_of_the_records(finished):
    summary, _, folder = finished
    records = read_records(folder / "records.jsonl")
    counts = (0, 20, 60, summary["training_images"])
    asked = {(s, w, n) for s in (0, 1) for w in recalibration.WEIGHTS for n in counts}
    assert {(r["seed"], r["weights"], r["images"]) for r in records} == asked
    for arm in summary["arms"]:
        for name in ("statistics_error", "test_accuracy"):
            values = [
                r[name]
                for r in records
                if (r["weights"], r["images"]) == (arm["weights"], arm["images"])
            ]
            assert arm[name]["median"] == np.median(values)
            assert arm[name]["range"] == [min(values), max(values)]


def test_more_images_err_less_and_all_of_them_not_at_all(finished):
    summary, _, _ = finished
    for weights in recalibration.WEIGHTS:
        arms = [a for a in summary["arms"] if a["weights"] == weights]
        running, few, more, everything = (a["statistics_error"]["median"] for a in arms)
        # Six updates with momentum .99 leave 94 % of mean 0 and variance 1.
        assert running > few > more > everything == 0


def test_the_error_of_statistics():
    def stats(mean, var):
        return {"bn": {"mean": jnp.array(mean), "var": jnp.array(var)}}

    # The last feature is constant: there is nothing to measure by.
    found = recalibration.statistics_error(
        stats([1.0, 2.0, 5.0], [4.0, 9.0, 0.0]), stats([0.0, 2.0, 5.0], [1.0, 4.0, 0.0])
    )
    errors = np.array([(1 - 0) / 1, 0, 2 / 1 - 1, 3 / 2 - 1])
    assert found == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-6)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--images=1", "counts of 2 or more"),
        ("--images=30,20", "in ascending order"),
        ("--steps=1", "the last half of them is averaged"),
        ("--images=2000", "digits has 1078 training images"),
        ("--recalibration_batch=1", "at least 2"),
    ],
)
def test_refusals(server, tmp_path, flag, message):
    arguments = ("--dataset=digits", "--model=mlp", f"--workdir={tmp_path}/w")
    assert message in server.run(*arguments, flag, code=RECALIBRATION).error()
    assert not (tmp_path / "w").exists()


def test_quick_is_a_size():
    quick = recalibration.Config(quick=True)
    assert (quick.dataset, quick.steps, quick.seeds) == ("digits", 100, 2)
