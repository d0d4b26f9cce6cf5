"""The figures: what they show, and that every kind of summary can be drawn."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.figures import (
    accuracy_against_rate,
    learning_curves,
    of_comparison,
    steps_against_rate,
)
from bn_jax.lab.report.page import DPI, write
from bn_jax.lab.report.plotting import (
    SPARE,
    STYLES,
    accuracy_scale,
    add_legend,
    arm_styles,
    new_figure,
)

FOUR = ("none", "bn", "layer", "group")
CASES = {
    "four arms": {"arms": FOUR},
    "one arm, rate and seed": {"arms": ("bn",), "rates": (0.1,), "seeds": 1},
    "all diverged": {"lost": True, "rates": (0.1, 0.3)},
    "target out of reach": {"target": 0.995, "rates": (0.1, 0.3)},
    "many rates": {"rates": tuple(np.geomspace(1e-5, 1, 26)), "seeds": 2},
    "scales": {"scales": (0.5, 1.0, 2.0), "arms": FOUR[:3], "rates": (0.1, 0.3)},
    "scales, all diverged": {"scales": (0.5, 2.0), "lost": True, "arms": ("bn",)},
    "other arms": {"arms": ("none", "ghost", "renorm"), "seeds": 2, "rates": (0.1, 0.3)},
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_summary_is_drawn(make, case):
    records, summary = make(**CASES[case])
    comparison = Outcome.of(summary)
    for figure in (
        *(figure for *_, figure in of_comparison(records, comparison)),
        steps_against_rate(comparison),
        accuracy_against_rate(comparison),
    ):
        figure.draw_without_rendering()


def test_numbers_that_are_missing(make):
    records, summary = make(rates=(0.1, 0.3))
    for record in records:
        record.test_accuracy[3] = None
    empty = {"median": None, "ci95": None}
    for point in (*summary["by_point"], *summary["arms"]):
        point |= {"steps_to_target": empty, "final_accuracy": empty, "max_accuracy": empty}
    comparison = Outcome.of(summary)
    for _, _, figure in (*of_comparison(records, comparison), *of_comparison([], comparison)):
        figure.draw_without_rendering()


def test_curves_are_medians_in_which_a_diverged_run_counts_as_0(make):
    records, summary = make(arms=("none",), rates=(0.1,))
    records[:2] = [dataclasses.replace(r, diverged_at=1000) for r in records[:2]]
    for record in records[:2]:
        record.test_accuracy[50:] = [None] * 26
    steps, seconds = learning_curves(records, Outcome.of(summary)).axes[:2]
    line = steps.lines[0]
    kept = np.median([r.test_accuracy[:50] for r in records], axis=0)
    np.testing.assert_allclose(line.get_ydata()[:50], 100 * kept)
    assert np.all(line.get_ydata()[50:] == 0)
    assert line.get_label() == "none, rate 0.1 (3 runs, 2 diverged)"
    per_step = np.median([r.seconds.per_step for r in records])
    np.testing.assert_allclose(seconds.lines[0].get_xdata(), per_step * line.get_xdata())


def test_rates_that_do_not_reach_are_hollow_in_the_strip(make):
    _, summary = make(arms=("none",))
    strip, panel = steps_against_rate(Outcome.of(summary)).axes
    missing = [p for p in summary["by_point"] if p["steps_to_target"]["median"] is None]
    hollow = [line for line in strip.lines if line.get_marker() == "o"]
    crosses = [line for line in strip.lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in hollow] == [p["learning_rate"] for p in missing]
    assert len(crosses) == sum(p["diverged"] >= 2 for p in missing) > 0
    drawn = panel.lines[0].get_ydata()
    assert np.isnan(drawn).sum() == len(missing) < len(drawn)


def test_scales_give_one_map_per_arm_with_its_best_point_framed(make):
    _, summary = make(scales=(0.5, 1.0, 2.0), rates=(0.03, 0.1, 0.3))
    comparison = Outcome.of(summary)
    *maps, bar = accuracy_against_rate(comparison).axes
    assert [ax.get_title(loc="left") for ax in maps] == ["none", "bn"]
    assert [float(t.get_text()) for t in bar.get_yticklabels()][:2] == [0, 50]
    scales, rates = comparison.values("init_scale"), comparison.rates
    for ax, best in zip(maps, summary["arms"], strict=True):
        shown = {t.get_position(): t.get_text() for t in ax.texts}
        assert shown == {
            (rates.index(p["learning_rate"]), scales.index(p["init_scale"])):
            f"{100 * p['final_accuracy']['median']:.1f}"
            for p in summary["by_point"]
            if p["arm"] == best["arm"] and 2 * p["diverged"] < p["seeds"]
        }  # fmt: skip
        column, row = ax.lines[0].get_xydata()[:4].mean(axis=0)
        framed = rates[int(column)], scales[int(row)]
        assert framed == (best["learning_rate"], best["init_scale"])


def test_arms_look_alike_in_all_figures_and_different_from_each_other():
    styles = arm_styles(("other", *FOUR, "ghost"))
    assert {name: styles[name] for name in FOUR} == STYLES
    assert (styles["other"], styles["ghost"]) == SPARE[:2]
    for look in zip(*STYLES.values(), *SPARE, strict=True):
        assert len(set(look)) == len(look)


@pytest.mark.parametrize("length", [12, 13, 50, 80])
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


def test_the_accuracy_scale_has_an_inverse():
    grid = np.linspace(0, 100, 1001)
    for near_100 in (True, False):
        forward, inverse, _ = accuracy_scale(near_100)
        assert np.all(np.diff(forward(grid)) > 0)
        np.testing.assert_allclose(inverse(forward(grid)), grid, atol=1e-9)


def test_files_are_repeatable_and_captions_lie_beside_them(make, config, tmp_path):
    made = make(rates=(0.1, 0.3))
    figures = tmp_path / "figures"
    write(*made, config, tmp_path)
    captions = json.loads((figures / "captions.json").read_text())
    assert list(captions) == ["learning_curves.png", "steps_to_target.png", "accuracy.png"]
    before = {path: path.read_bytes() for path in figures.iterdir()}
    assert {path.name for path in before} == {"captions.json", *captions}
    write(*made, config, tmp_path)
    assert {path: path.read_bytes() for path in figures.iterdir()} == before


def test_captions_say_what_is_shown(make):
    def captions(**case):
        records, summary = make(rates=(0.1, 0.3), **case)
        return [text for _, text, _ in of_comparison(records, Outcome.of(summary))]

    _, steps, accuracy = captions()
    assert "Medians over 3 runs" in steps
    assert "the budget of 1,500 steps" in steps
    assert "95 % intervals" in accuracy
    _, steps, accuracy = captions(scales=(1.0, 2.0), seeds=1)
    assert "each arm at the initial scale of its best point" in steps
    assert "no interval" in steps
    assert "Framed" in accuracy


def test_import_is_cheap_and_touches_no_plotting_state():
    code = (
        "import sys, bn_jax.lab.report\n"
        "print(*(m in sys.modules for m in ('numpy', 'jinja2', 'rich')))\n"
        "from bn_jax.lab.report import page, plotting, terminal\n"
        "print('matplotlib' in sys.modules, 'jax' in sys.modules)\n"
        "plotting.new_figure(2, 2)\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"] * 5 + ["True", "False"]
