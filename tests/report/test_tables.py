"""The table and the sentences."""

import html
import io

import pytest
from rich.console import Console

from bn_jax.report import html_page, print_summary, speedup_lines, summary_rows
from bn_jax.report.tables import same_rate_rows
from bn_jax.report.text import bracketed, number, padded, percent, whole

BUDGET = 1500


def estimate(median, low=None, high=None):
    return {"median": median, "ci95": [low, high]}


def arm(name="bn", steps=310, *, seeds=5, reached=5, **more):
    return {
        "arm": name,
        "learning_rate": 0.1,
        "init_scale": 1.0,
        "momentum": None,
        "seeds": seeds,
        "reached": reached,
        "steps_to_target": estimate(steps, 290, 350),
        "seconds_to_target": estimate(1.2, 1.1, 1.4),
        "max_accuracy": estimate(0.971, 0.968, 0.975),
        "final_accuracy": estimate(0.97, 0.96, 0.974),
        "trains": True,
        "trainable_learning_rates": [0.001, 0.3],
        "diverged": 0,
    } | more


def summary_of(*arms, speedup=(), **more):
    return {
        "dataset": "digits",
        "model": "mlp",
        "baseline": "none",
        "budget_steps": BUDGET,
        "target": {"metric": "test_accuracy", "value": 0.95, "chosen": "given"},
        "arms": list(arms),
        "speedup": list(speedup),
        "by_point": list(arms),
    } | more


def compared(steps, seconds=None, *, base=None, arms=None):
    """The sentence about bn and none with these ratios."""
    pair = {"arm": "bn", "over": "none", "steps": steps, "seconds": seconds}
    both = (base or arm("none"), arms or arm("bn"))
    (line,) = speedup_lines(summary_of(*both, speedup=[pair]))
    return line.removeprefix("Each arm at its own best learning rate: ")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1, "0.1"), (1e-5, "1e-5"), (0.30000001, "0.3"), (2.04, "2.04"), (12.345, "12.3"),
     (999.6, "1,000"), (12345.6, "12,346"), (0.0, "0"), (100, "100"),
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
    assert bracketed([None, None], whole, ">1,500") == ""
    assert bracketed(None, whole, ">1,500") == ""
    assert bracketed([290, float("inf")], whole, "never") == "[290, never]"


def test_a_row_has_every_number_with_its_interval():
    header, (row,) = summary_rows(summary_of(arm()))
    assert dict(zip(header, row, strict=True)) == {
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
    lost = arm(reached=2, trainable_learning_rates=None)
    lost |= {"steps_to_target": estimate(None, 1290), "seconds_to_target": estimate(None)}
    _, (row,) = summary_rows(summary_of(lost))
    assert row[2:4] == ["not reached\n[1,290, >1,500]", "not reached"]
    assert row[5:7] == ["no rate", "2 of 5"]


def test_one_seed_has_no_interval():
    _, (row,) = summary_rows(summary_of(arm(seeds=1, reached=1)))
    assert row[2:5] == ["310", "1.20", "97.1"]


def test_the_best_point_names_what_the_grid_varies():
    points = [
        arm(init_scale=scale, momentum=momentum)
        for scale in (1.0, 2.0)
        for momentum in (0.9, 0.99)
    ]
    _, (row,) = summary_rows(summary_of(points[1], by_point=points))
    assert row[1] == "0.1\nscale 1\nmomentum 0.99"


def test_table_at_the_same_rate(make):
    _, summary = make(arms=("none", "bn", "layer"))
    header, rows = same_rate_rows(summary)
    assert [row[0] for row in rows] == ["none", "bn", "layer"]
    assert all(row[header.index("trains")] == "yes" for row in rows)
    assert same_rate_rows(summary | {"at_same_learning_rate": None}) is None


def test_faster_in_steps_and_seconds():
    assert compared({"ratio": 2.9, "ci95": [2.4, 3.3]}, {"ratio": 2.2, "ci95": [1.8, 2.6]}) == (
        "bn reaches the target in 2.9 times fewer steps than none [95 % interval 2.4 to 3.3]; "
        "2.2 times less time [1.8 to 2.6]."
    )


def test_slower_is_told_as_the_inverse():
    assert compared(
        {"ratio": 0.5, "ci95": [0.4, 0.8]}, {"ratio": 0.25, "ci95": [0.2, None]}
    ) == (
        "bn reaches the target in 2 times more steps than none [95 % interval 1.25 to 2.5]; "
        "4 times more time [5 or less, may be chance]."
    )


def test_fewer_steps_but_more_time():
    line = compared({"ratio": 1.5, "ci95": [1.2, 2]}, {"ratio": 0.8, "ci95": [0.7, 0.9]})
    assert "fewer steps than none [95 % interval 1.2 to 2]; but 1.25 times more time" in line


@pytest.mark.parametrize(
    ("ci95", "text"),
    [([0.9, 1.4], "0.9 to 1.4, may be chance"), ([1.05, None], "1.05 or more"),
     ([None, 1.4], "1.4 or less, may be chance"), ([0.0, 1.4], "1.4 or less, may be chance"),
     ([None, None], "open at both ends, may be chance")],
)  # fmt: skip
def test_an_interval_that_includes_1_may_be_chance(ci95, text):
    line = compared({"ratio": 1.1, "ci95": ci95})
    assert line.endswith(f"1.1 times fewer steps than none [95 % interval {text}].")


@pytest.mark.parametrize("ratio", [1.0, 0.9999, 1.0001])
def test_equal_arms(ratio):
    line = compared({"ratio": ratio, "ci95": [0.9, 1.1]})
    assert line == "bn reaches the target in as many steps as none [95 % interval 0.9 to 1.1]."


def test_one_seed_allows_no_interval():
    line = compared({"ratio": 3, "ci95": [3, 3]}, arms=arm("bn", seeds=1))
    assert line == (
        "bn reaches the target in 3 times fewer steps than none (one seed: no interval)."
    )


def test_a_baseline_that_does_not_reach_gives_a_bound():
    base = arm("none", None, reached=1)
    part = {"ratio": None, "ci95": [3.1, None], "at_least": 5.2}
    assert compared(part, {"ratio": None, "ci95": [None, None]}, base=base) == (
        "bn reaches the target in more than 5.2 times fewer steps than none "
        "[95 % interval 3.1 or more]; the median run with none does not reach it within "
        "1,500 steps (1 of 5 runs do)."
    )
    # The bound of the medians is 5.2, but resamples of the seeds go either way.
    assert "may be chance" in compared(part | {"ci95": [0.0, None]}, base=base)


def test_unreached_by_the_arm_or_by_both():
    part, lost = {"ratio": None, "ci95": [None, None]}, arm("bn", None, reached=1)
    assert compared(part, arms=lost) == (
        "the median run with bn does not reach the target within 1,500 steps "
        "(1 of 5 runs do); that with none does (5 of 5)."
    )
    assert compared(part, arms=lost, base=arm("none", None, reached=0)) == (
        "the median run does not reach the target within 1,500 steps, "
        "with bn (1 of 5 runs do) or with none (0 of 5)."
    )


@pytest.mark.parametrize("ratio", [None, 0.0])
def test_a_target_reached_at_step_0_has_no_ratio(ratio):
    part = {"ratio": ratio, "ci95": [None, None]}
    assert compared(part, arms=arm("bn", 0)) == (
        "the median run with bn reaches the target after 0 steps, that with none after 310."
    )


def test_lines_of_four_arms(make):
    lines = speedup_lines(make(arms=("none", "bn", "layer", "group"))[1])
    assert len(lines) == 6
    assert all(line.startswith("Each arm at its own best") for line in lines[:3])
    assert all(line.startswith("All arms at learning rate 0.1: ") for line in lines[3:])


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
    same = {"learning_rate": 1.0, "arms": list(bests), "speedup": [pair]}
    summary = summary_of(
        *bests, speedup=[pair], by_point=[*points[0], *points[1]], at_same_learning_rate=same
    )
    first, *ends, last = speedup_lines(summary)
    assert first.startswith("Each arm at its own best learning rate: bn reaches")
    assert ends == lines
    assert last.startswith("All arms at learning rate 1: bn reaches")
    page = html_page(summary, {}, [], "Which?")
    for line in lines:
        assert page.count(html.escape(line)) == 1


def test_one_arm_leaves_nothing_to_compare(make):
    _, summary = make(arms=("bn",))
    assert speedup_lines(summary) == ["Nothing to compare: the only runs are of bn."]


def printed(summary, width=80, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_summary(summary, Console(file=file, width=width))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_print_fits_80_columns(make, encoding):
    text = printed(make(arms=("none", "bn", "layer", "group"))[1], encoding=encoding)
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()
    assert "Target: test accuracy 95 % (given), within 1,500 steps" in text
    for word in ("learning", "diverged", "5 of 5", "group", "times"):
        assert word in text


@pytest.mark.parametrize("width", [30, 80])
def test_print_folds_and_never_cuts(width):
    name = "an_arm_with_a_name_of_more_than_a_line_has_room_for"
    text = printed(summary_of(arm(name), dataset="[red]digits"), width)
    assert "[red]digits" in text
    assert "…" not in text
    folded = "".join(line.split(" ")[0] for line in text.splitlines())
    assert name in folded


def test_print_goes_to_standard_output(make, capsys):
    print_summary(make(rates=(0.1,), seeds=1)[1])
    assert "one seed: no interval" in capsys.readouterr().out
