"""The tables, in all their forms, and the sentences."""

import io

import pytest
from rich.console import Console

from bn_jax.lab.report import markdown
from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.sentences import answer, speedup_lines
from bn_jax.lab.report.tables import Table, Wrong, same_rate_table, summary_table
from bn_jax.lab.report.terminal import print_summary, print_table
from bn_jax.lab.report.text import bracketed, in_line, number, padded, percent, whole
from bn_jax.lab.statistics.convergence import Estimate


def estimate(median, low=None, high=None):
    return {"median": median, "ci95": [low, high]}


def arm(name="bn", steps=310, *, seeds=5, reached=5, **more):
    point = {"arm": name, "learning_rate": 0.1, "init_scale": 1.0, "momentum": None}
    counts = {"seeds": seeds, "reached": reached, "diverged": 0}
    return (
        point
        | counts
        | {
            "steps_to_target": estimate(steps, 290, 350),
            "seconds_to_target": estimate(1.2, 1.1, 1.4),
            "max_accuracy": estimate(0.971, 0.968, 0.975),
            "final_accuracy": estimate(0.97, 0.96, 0.974),
            "trains": True,
            "trainable_learning_rates": [0.001, 0.3],
        }
        | more
    )


def summary_of(*arms, **more):
    about = {"dataset": "digits", "model": "mlp", "baseline": "none", "budget_steps": 1500}
    target = {"metric": "test_accuracy", "value": 0.95, "chosen": "given"}
    return about | {"target": target, "arms": [*arms], "speedup": []} | more


def comparison_of(*arms, **more):
    return Outcome.of(summary_of(*arms, **more))


NONE = {"ratio": None, "ci95": [None, None]}


def compared(steps, seconds=NONE, *, base=None, own=None):
    """The sentence about bn and none with these ratios."""
    pair = {"arm": "bn", "over": "none", "steps": steps, "seconds": seconds}
    both = (base or arm("none"), own or arm("bn"))
    (line,) = answer(comparison_of(*both, speedup=[pair]))
    return line


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "1e-5"), (0.30000001, "0.3"), (12.345, "12.3"), (999.6, "1,000"), (0.0, "0"),
     (9_780_135, "9,780,135"), (10_355_565_846, "1.04e10"), (-2e8, "-2e8")],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text


def test_numbers_in_columns_keep_their_zeros():
    assert [padded(v) for v in (2, 0.5, 100, 1234, 1e-7)] == [
        "2.00", "0.500", "100", "1,234", "1e-7",
    ]  # fmt: skip
    assert (whole(1234.5), percent(0.9996)) == ("1,234", "100.0")


def test_open_intervals():
    assert bracketed([290, None], whole, ">1,500") == "[290, >1,500]"
    assert bracketed([290, float("inf")], whole, "never") == "[290, never]"
    assert bracketed([None, None], whole, ">1,500") == bracketed(None, whole, "") == ""
    assert in_line(Estimate(310, (290, None), 2), whole) == "310 [290, ∞]"
    assert in_line(Estimate(310, (290, None), 1), whole) == "310"
    assert in_line(Estimate(None, (290, None), 2), whole) == "not reached"


def test_a_row_has_every_number_with_its_interval():
    table = summary_table(comparison_of(arm()))
    assert dict(zip(table.header, *table.rows, strict=True)) == {
        "arm": "bn",
        "best learning rate": "0.1",
        "steps to target": "310\n[290, 350]",
        "seconds to target": "1.20\n[1.10, 1.40]",
        "best test accuracy (%)": "97.1\n[96.8, 97.5]",
        "rates that train": "0.001 to 0.3",
        "runs reached": "5 of 5",
        "runs diverged": "0 of 5",
    }


def test_a_row_of_an_arm_that_does_not_reach():
    lost = arm(reached=2, diverged=3, trainable_learning_rates=None)
    lost |= {"steps_to_target": estimate(None, 1290), "seconds_to_target": estimate(None)}
    (row,) = summary_table(comparison_of(lost)).rows
    assert row[2:4] == ["not reached\n[1,290, >1,500]", "not reached"]
    assert row[5:] == ["no rate", "2 of 5", "3 of 5"]


def test_the_best_point_names_what_the_grid_varies():
    points = [arm(init_scale=s, momentum=m) for s in (1.0, 2.0) for m in (0.9, 0.99)]
    (row,) = summary_table(comparison_of(points[1], by_point=points)).rows
    assert row[1] == "0.1\nscale 1\nmomentum 0.99"


def test_table_at_the_same_rate(make):
    _, summary = make(arms=("none", "bn", "layer"))
    table = same_rate_table(Outcome.of(summary))
    assert [row[0] for row in table.rows] == ["none", "bn", "layer"]
    found = [row[table.header.index("trains")] for row in table.rows]
    same = summary["at_same_learning_rate"]["arms"]
    assert found == ["yes" if a["trains"] else "no" for a in same]
    alone = Outcome.of(summary | {"at_same_learning_rate": None})
    assert same_rate_table(alone) is None


@pytest.mark.parametrize(
    ("steps", "seconds", "line"),
    [
        ((2.9, 2.4, 3.3), (2.2, 1.8, 2.6),
         "bn reaches the target in 2.9 times fewer steps than none [95 % interval 2.4 to 3.3]; "
         "2.2 times less time [1.8 to 2.6]."),
        ((0.5, 0.4, 0.8), (0.25, 0.2, None),
         "bn reaches the target in 2 times more steps than none [95 % interval 1.25 to 2.5]; "
         "4 times more time [5 or less, may be chance]."),
        ((1.5, 1.2, 2), (0.8, 0.7, 0.9),
         "bn reaches the target in 1.5 times fewer steps than none [95 % interval 1.2 to 2]; "
         "but 1.25 times more time [1.11 to 1.43]."),
        ((1.0001, 0.9, 1.1), (None, None, None),
         "bn reaches the target in as many steps as none [95 % interval 0.9 to 1.1]."),
    ],
)  # fmt: skip
def test_a_ratio_in_words(steps, seconds, line):
    parts = ({"ratio": ratio, "ci95": ends} for ratio, *ends in (steps, seconds))
    assert compared(*parts) == line


@pytest.mark.parametrize(
    ("ci95", "text"),
    [([0.9, 1.4], "0.9 to 1.4, may be chance"), ([1.05, None], "1.05 or more"),
     ([None, 1.4], "1.4 or less, may be chance"), ([0.0, 1.4], "1.4 or less, may be chance"),
     ([None, None], "open at both ends, may be chance")],
)  # fmt: skip
def test_an_interval_that_includes_1_may_be_chance(ci95, text):
    line = compared({"ratio": 1.1, "ci95": ci95})
    assert line.endswith(f"1.1 times fewer steps than none [95 % interval {text}].")


def test_one_seed_has_no_interval():
    (row,) = summary_table(comparison_of(arm(seeds=1, reached=1))).rows
    assert row[2:5] == ["310", "1.20", "97.1"]
    line = compared({"ratio": 3, "ci95": [3, 3]}, own=arm("bn", seeds=1))
    assert line == (
        "bn reaches the target in 3 times fewer steps than none (one seed: no interval)."
    )


def test_a_baseline_that_does_not_reach_gives_a_bound():
    base = arm("none", None, reached=1)
    part = {"ratio": None, "ci95": [3.1, None], "at_least": 5.2}
    assert compared(part, base=base) == (
        "bn reaches the target in more than 5.2 times fewer steps than none "
        "[95 % interval 3.1 or more]; the median run with none does not reach it within "
        "1,500 steps (1 of 5 runs do)."
    )
    # The bound of the medians is 5.2, but resamples of the seeds go either way.
    assert "may be chance" in compared(part | {"ci95": [0.0, None]}, base=base)


def test_unreached_by_the_arm_or_by_both():
    lost = arm("bn", None, reached=1)
    assert compared(NONE, own=lost) == (
        "the median run with bn does not reach the target within 1,500 steps "
        "(1 of 5 runs do); that with none does (5 of 5)."
    )
    assert compared(NONE, own=lost, base=arm("none", None, reached=0)) == (
        "the median run does not reach the target within 1,500 steps, "
        "with bn (1 of 5 runs do) or with none (0 of 5)."
    )


@pytest.mark.parametrize("ratio", [None, 0.0])
def test_a_target_reached_at_step_0_has_no_ratio(ratio):
    assert compared({"ratio": ratio, "ci95": [None, None]}, own=arm("bn", 0)) == (
        "the median run with bn reaches the target after 0 steps, that with none after 310."
    )


def at_rate(name, rate, rates):
    """An arm at its best rate, and its points."""
    return arm(name, learning_rate=rate), [arm(name, learning_rate=r) for r in rates]


@pytest.mark.parametrize(
    ("none", "bn", "lines"),
    [
        ((1.0, (0.1, 1.0, 3.0)), (3.0, (0.1, 1.0, 3.0)),
         ["bn's best learning rate, 3, is the largest that was tried."]),
        ((0.1, (0.1, 1.0)), (10.0, (1.0, 10.0)),
         ["none's best learning rate, 0.1, is the smallest that was tried; "
          "bn's, 10, the largest."]),
        ((1.0, (0.1, 1.0, 3.0)), (0.3, (0.3,)), []),  # one rate is no grid
    ],
)  # fmt: skip
def test_a_best_rate_at_an_end_of_the_grid_is_told(none, bn, lines):
    bests, points = zip(at_rate("none", *none), at_rate("bn", *bn), strict=True)
    pair = {"arm": "bn", "over": "none", "steps": {"ratio": 2.0, "ci95": [1.5, 3.0]}}
    pair["seconds"] = NONE
    same = {"learning_rate": 1.0, "arms": [arm(a["arm"], learning_rate=1.0) for a in bests]}
    comparison = comparison_of(
        *bests, speedup=[pair], by_point=[*points[0], *points[1]],
        at_same_learning_rate=same | {"speedup": [pair]},
    )  # fmt: skip
    first, *ends, last = speedup_lines(comparison)
    assert first.startswith("Each arm at its own best learning rate: bn reaches")
    assert ends == answer(comparison)[1:] == lines
    assert last.startswith("All arms at learning rate 1: bn reaches")


def test_one_arm_leaves_nothing_to_compare():
    line = "Nothing to compare: the only runs are of bn."
    assert speedup_lines(comparison_of(arm())) == answer(comparison_of(arm())) == [line]


def test_markdown():
    assert markdown.table(["a\nb", "c"], [["x|y", Wrong("1")], ["", "2"]]) == (
        "| a<br>b | c |\n| :-- | --: |\n| x\\|y | **1** ✗ |\n|  | 2 |\n"
    )


@pytest.mark.parametrize(("colours", "cell"), [("standard", " 2 x\x1b[0m\n"), (None, " 2 x\n")])
def test_wrong_cells_on_a_terminal_and_in_a_log(colours, cell):
    out = io.StringIO()
    console = Console(file=out, width=80, color_system=colours)
    print_table(Table("Why?", ["case", "here"], [["a to b", Wrong("2")]]), console)
    assert "\nWhy?\n" in out.getvalue()
    assert out.getvalue().endswith(cell)
    assert ("\x1b[1;31m" in out.getvalue()) == (colours is not None)


def printed(summary, width=80):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_summary(summary, Console(file=file, width=width))
    file.flush()
    return file.buffer.getvalue().decode()


def test_print_fits_80_columns_of_ascii(make):
    _, summary = make(arms=("none", "bn", "layer", "group"))
    published = [{"quantity": "loss", "here": "1", "source": "2", "agrees": True}]
    text = printed(summary | {"published": published, "seconds": {"total": 1.0}})
    assert max(map(len, text.splitlines())) <= 80
    for words in ("Target: test accuracy 95 % (given), within 1,500 steps", "3 of 3", "times",
                  "Beside the published numbers", "Time: total 1.0 s."):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("width", [30, 80])
def test_print_folds_and_never_cuts(width):
    name = "an_arm_with_a_name_of_more_than_a_line_has_room_for"
    text = printed(summary_of(arm(name), dataset="[red]digits"), width)
    assert "[red]digits" in text
    folded = "".join(line.split(" ")[0] for line in text.splitlines())
    assert name in folded
