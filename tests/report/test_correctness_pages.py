"""The comparison of correctness: cells, marks, and what is held against bn_jax."""

import io

import pytest
from rich.console import Console
from test_page import parse

from bn_jax.report import Wrong, markdown, markup, terminal_table
from bn_jax.report.correctness import html_page, markdown_page, table

QUESTION = "Which is right?"
CONFIG = {
    "command": "python -m experiments.correctness",
    "versions": {"jax": "0.10.2", "torch": None},
    "devices": ["cpu: cpu"],
}


def answered(value, right, detail=None):
    return {"value": value, "right": right, "detail": detail}


def case(number="D1a", *, ours="", by_default=None, or_refused=False, **answers):
    return {
        "number": number, "title": "a title", "measured": f"what {number} is", "true": 1.5,
        "tolerance": 0.001, "or_refused": or_refused, "ours": ours, "by_default": by_default,
        "answers": answers,
    }  # fmt: skip


def otherwise(number, by_default):
    """A case in which our layer as it comes gives `by_default`."""
    default = answered(by_default, False)
    return case(number, ours="`x=1`", by_default=default, bn_jax=answered(1.5, True))


def summary_of(*cases):
    return {
        "frameworks": [
            {"name": "bn_jax", "installed": True, "right": 2, "cases": 2},
            {"name": "haiku", "installed": True, "right": 0, "cases": 1},
            {"name": "torch", "installed": False, "right": 0, "cases": 0},
        ],
        "defects": [
            {"number": "D1", "title": "Masks", "note": "Because `f` is.", "cases": list(cases)}
        ],
    }


SUMMARY = summary_of(
    case(bn_jax=answered(1.5, True), haiku=answered(0.3434, False)),
    case("D1b", or_refused=True, bn_jax=answered("error", True, "ValueError")),
)


def test_the_table():
    header, rows = table(SUMMARY)
    counts = ["bn_jax\n2 of 2", "haiku\n0 of 1", "torch\nabsent"]
    assert header == ["case", "true value", *counts]
    assert rows == [
        ["D1a a title", "1.5", "1.5", "0.343", ""],
        ["D1b a title", "1.5\nor error", "error", "-", ""],
    ]
    assert [[isinstance(cell, Wrong) for cell in row] for row in rows] == [
        [False, False, False, True, False],
        [False] * 5,
    ]


def test_the_page_in_markdown():
    page = markdown_page(SUMMARY, CONFIG, QUESTION)
    assert page.startswith("# Which is right?\n\n2 small cases")
    assert "\n```\npython -m experiments.correctness\n```\n" in page
    assert "With jax 0.10.2, torch not installed, on cpu: cpu.\n" in page
    assert "\n| D1a a title | 1.5 | 1.5 | **0.343** ✗ |  |\n" in page
    assert "\n### D1. Masks\n\nBecause `f` is.\n" in page
    assert "\n- D1b, right within 0.001: what D1b is. bn_jax: ValueError.\n" in page
    assert page.endswith(".\n")
    assert "\n\n\n" not in page


def test_the_page_in_html():
    page = html_page(SUMMARY, CONFIG, QUESTION)
    found = parse(page)
    assert page.count('<td class="wrong">') == page.count("✗") == 1
    assert '<td class="wrong">0.343 ✗</td>' in page
    assert "D1a, right within 0.001: what D1a is." in page
    assert "`" not in page
    assert not found.references
    text = " ".join(found.text)
    for shown in ("0.10.2", "python -m experiments.correctness", "2 of 2", "Because f is."):
        assert shown in text


def test_html_is_escaped():
    evil = "<script>&"
    shown = case(bn_jax=answered(evil, True), haiku=answered(evil, False, evil))
    page = html_page(summary_of(shown | {"title": evil, "measured": evil}), CONFIG, evil)
    assert "<script>" not in page
    assert parse(page).tags.count("script") == 0


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        (
            [otherwise("D2", "inf"), otherwise("D3", 4.0)],
            "Measured with `x=1`, and wrong without: the layer as it comes gives inf in D2, "
            "4 in D3.",
        ),
        ([case("D2"), case("D3")], "bn_jax lacks what is asked in D2, D3."),
        ([case("D2", bn_jax=answered(4.0, False))], "bn_jax is wrong in D2."),
    ],
)
def test_what_is_held_against_bn_jax(shown, line):
    summary = summary_of(*shown)
    section = markdown_page(summary, CONFIG, QUESTION).split("## ")[1]
    assert section.startswith("Where bn_jax does not do better\n")
    assert f"\n- {line}\n" in section
    assert line.replace("`", "") in html_page(summary, CONFIG, QUESTION)


def test_a_table_in_markdown():
    assert markdown.table(["a\nb", "c"], [["x|y", Wrong("1")], ["", "2"]]) == (
        "| a<br>b | c |\n| :-- | --: |\n| x\\|y | **1** ✗ |\n|  | 2 |\n"
    )


@pytest.mark.parametrize(("colours", "cell"), [("standard", " 2 x\x1b[0m\n"), (None, " 2 x\n")])
def test_wrong_cells_on_a_terminal_and_in_a_log(colours, cell):
    out = io.StringIO()
    console = Console(file=out, width=80, color_system=colours)
    console.print(terminal_table(["case", "flax linen\n1 of 2"], [["a to b", Wrong("2")]]))
    head, *_, last = out.getvalue().split("--", 1)
    assert head.index("flax") < head.index("linen") < head.index("1 of 2")
    assert "\n" in head[head.index("flax") : head.index("linen")]
    assert "a to b" in last
    assert cell in last
    assert ("\x1b[1;31m" in last) == (colours is not None)


def test_a_cell_of_html_that_is_wrong_and_one_that_is_not():
    page = markup.table("", ["a", "b\nc"], [["n", "1"], ["m", Wrong("<2")]])
    assert "<td>1</td>" in page
    assert '<td class="wrong">&lt;2 ✗</td>' in page
    assert '<th scope="col">b<small>c</small></th>' in page
