"""The figures: what they show, and that every kind of summary can be drawn."""

import io
import subprocess
import sys

import numpy as np
import pytest

from bn_jax.report import (
    accuracy_against_rate,
    captions,
    learning_curves,
    save_all,
    steps_against_rate,
)
from bn_jax.report.figures import DPI
from bn_jax.report.plotting import (
    SPARE,
    STYLES,
    accuracy_scale,
    add_legend,
    arm_styles,
    new_figure,
)
from bn_jax.report.points import all_rates
from bn_jax.report.regions import decision_regions

FOUR = ("none", "bn", "layer", "group")
CASES = {
    "two arms": {},
    "four arms": {"arms": FOUR},
    "one arm, rate and seed": {"arms": ("bn",), "rates": (0.1,), "seeds": 1},
    "all diverged": {"lost": True},
    "target out of reach": {"target": 0.995},
    "many rates": {"rates": tuple(np.geomspace(1e-5, 1, 26)), "seeds": 2},
    "scales": {"scales": (0.5, 1.0, 2.0), "arms": FOUR[:3]},
    "scales, all diverged": {"scales": (0.5, 2.0), "lost": True, "arms": ("bn",)},
    "other arms": {"arms": ("none", "ghost", "renorm"), "seeds": 2},
}


def render(figure):
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    return file.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_summary_is_drawn(make, case):
    records, summary = make(**CASES[case])
    for figure in (
        learning_curves(records, summary),
        steps_against_rate(summary),
        accuracy_against_rate(summary),
    ):
        assert render(figure).startswith(b"\x89PNG")


def test_numbers_that_are_missing_or_not_finite(make):
    records, summary = make(rates=(0.1, 0.3))
    for record in records:
        record["test_accuracy"][3] = float("nan")
        record["seconds"] = None
    empty = {"median": None, "ci95": [None, None]}
    for point in summary["by_point"]:
        point |= {"steps_to_target": empty, "final_accuracy": empty, "max_accuracy": empty}
    for arm in summary["arms"]:
        arm["max_accuracy"] = {"median": float("nan"), "ci95": None}
    render(learning_curves(records, summary))
    render(steps_against_rate(summary))
    render(accuracy_against_rate(summary))
    render(learning_curves([], summary))


def test_curves_are_medians_in_which_a_diverged_run_counts_as_0(make):
    records, summary = make(arms=("none",), rates=(0.1,), seeds=3)
    for record in records[:2]:
        record["diverged_at"] = 1000
        record["test_accuracy"][50:] = [None] * 26
    panel = learning_curves(records, summary).axes[0]
    line = panel.lines[0]
    kept = np.median([r["test_accuracy"][:50] for r in records], axis=0)
    np.testing.assert_allclose(line.get_ydata()[:50], 100 * kept)
    assert np.all(line.get_ydata()[50:] == 0)
    assert line.get_label() == "none, rate 0.1 (3 runs, 2 diverged)"


def test_the_second_panel_is_in_training_seconds(make):
    records, summary = make(arms=("none",), rates=(0.1,), seeds=1)
    steps, seconds = learning_curves(records, summary).axes[:2]
    per_step = records[0]["seconds"]["per_step"]
    np.testing.assert_allclose(
        seconds.lines[0].get_xdata(), per_step * steps.lines[0].get_xdata()
    )


def test_rates_that_do_not_reach_are_hollow_in_the_strip(make):
    _, summary = make(arms=("none",))
    strip, panel = steps_against_rate(summary).axes
    missing = [p for p in summary["by_point"] if p["steps_to_target"]["median"] is None]
    hollow = [line for line in strip.lines if line.get_marker() == "o"]
    crosses = [line for line in strip.lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in hollow] == [p["learning_rate"] for p in missing]
    assert len(crosses) == sum(p["diverged"] >= 3 for p in missing) > 0
    drawn = panel.lines[0].get_ydata()
    assert np.isnan(drawn).sum() == len(missing) < len(drawn)


def test_scales_give_one_map_per_arm_with_its_best_point_framed(make):
    _, summary = make(scales=(0.5, 1.0, 2.0))
    *maps, bar = accuracy_against_rate(summary).axes
    assert [ax.get_title(loc="left") for ax in maps] == ["none", "bn"]
    assert bar.get_ylabel() == "final test accuracy (%)"
    point = next(p for p in summary["by_point"] if p["arm"] == "bn" and p["trains"])
    row = [0.5, 1.0, 2.0].index(point["init_scale"])
    column = all_rates(summary).index(point["learning_rate"])
    shown = maps[1].images[0].get_array()
    assert shown[row, column] == pytest.approx(100 * point["final_accuracy"]["median"])
    best = summary["arms"][1]
    frame = maps[1].lines[0].get_xydata()[:4].mean(axis=0)
    assert all_rates(summary)[int(frame[0])] == best["learning_rate"]


def test_arms_look_alike_in_all_figures_and_different_from_each_other(make):
    _, summary = make(arms=("other", *FOUR, "ghost"), rates=(0.1,), seeds=1)
    styles = arm_styles(summary)
    assert {name: styles[name] for name in FOUR} == STYLES
    assert (styles["other"], styles["ghost"]) == SPARE[:2]
    for look in zip(*STYLES.values(), *SPARE, strict=True):
        assert len(set(look)) == len(look)


@pytest.mark.parametrize("length", [4, 12, 13, 35, 50, 80])
def test_the_legend_fits_into_the_figure(length):
    figure = new_figure()
    ax = figure.subplots()
    for _ in range(6):
        words = "bn_momentum_0, rate 0.01, momentum 0.99 (100 runs), initial scale 0.5, seed 11"
        ax.plot([0, 1], label=words[:length])
    add_legend(figure, ax)
    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_accuracy_scale_is_invertible_and_linear_where_nothing_is_near_100():
    grid = np.linspace(0, 100, 1001)
    near, far = ([{"max_accuracy": {"median": best}}] for best in (0.97, 0.6))
    forward, inverse, _ = accuracy_scale({"arms": near})
    assert np.all(np.diff(forward(grid)) > 0)
    np.testing.assert_allclose(inverse(forward(grid)), grid, atol=1e-9)
    forward, _, _ = accuracy_scale({"arms": far})
    np.testing.assert_array_equal(forward(grid), grid)


def test_files_are_small_repeatable_and_have_captions(make, tmp_path):
    records, summary = make(arms=FOUR)
    paths = save_all(records, summary, tmp_path / "figures")
    assert [p.name for p in paths] == [
        "learning_curves.png", "steps_to_target.png", "accuracy.png",
    ]  # fmt: skip
    assert all(10_000 < path.stat().st_size < 180_000 for path in paths)
    before = [path.read_bytes() for path in paths]
    assert [p.read_bytes() for p in save_all(records, summary, tmp_path / "figures")] == before
    assert len(captions(summary)) == len(paths)


def test_captions_say_what_is_shown(make):
    curves, steps, accuracy = captions(make()[1])
    assert "the band reaches from the lower to the upper quartile" in curves
    assert "Medians over 5 runs" in steps
    assert "the budget of 1,500 steps" in steps
    assert "95 % intervals" in accuracy
    _, steps, accuracy = captions(make(scales=(1.0, 2.0), seeds=1)[1])
    assert "each arm at the initial scale of its best point" in steps
    assert "no interval" in steps
    assert "Framed" in accuracy


def test_import_is_cheap_and_touches_no_plotting_state():
    code = (
        "import sys, bn_jax.report; print('matplotlib' in sys.modules, 'rich' in sys.modules)\n"
        "from bn_jax.report import plotting; plotting.new_figure(2, 2)\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False", "True", "False"]


@pytest.mark.parametrize("arms", [1, 4, 6])
def test_the_data_stand_beside_the_decision_regions(arms):
    noise = np.random.default_rng(0)
    train, test = ((noise.uniform(-1, 1, (n, 2)), np.arange(n) % 3 // 2) for n in (30, 12))
    side = np.linspace(-1.5, 1.5, 8)
    plane = np.add.outer(side, side) / 6 + 0.5
    figure = decision_regions({f"arm_{i}": plane for i in range(arms)}, side, train, test)
    data, *panels = figure.axes
    assert [ax.get_title() for ax in panels] == [f"arm_{i}" for i in range(arms)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "class 0, 20 to train on", "class 1, 10 to train on",
        "class 0, 8 to test on", "class 1, 4 to test on",
    ]  # fmt: skip
    drawn = [line for line in data.lines if len(line.get_xdata())]
    assert [len(line.get_xdata()) for line in drawn] == [20, 10, 8, 4]
    assert [line.get_fillstyle() for line in drawn] == ["full", "full", "none", "none"]
    # The classes by marker and colour, each alone.
    for look in ("marker", "color"):
        kinds = [getattr(line, f"get_{look}")() for line in drawn]
        assert kinds == 2 * kinds[:2]
        assert kinds[0] != kinds[1]
    figure.draw_without_rendering()
    whole, found = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert whole.x0 <= found.x0 < found.x1 <= whole.x1
    assert whole.y0 <= found.y0 < found.y1 <= whole.y1
    lowest = [ax for i, ax in enumerate(panels) if i + 3 >= arms]
    assert all(ax.xaxis.get_tick_params()["labelbottom"] for ax in lowest)
