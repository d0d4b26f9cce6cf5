"""The comparison of correctness as a table, a page in Markdown and one in HTML."""

from __future__ import annotations

from collections.abc import Iterable

from bn_jax.lab.report import markdown
from bn_jax.lab.report.page import Page, Section
from bn_jax.lab.report.tables import Table, Wrong
from bn_jax.lab.report.text import number

OURS = "bn_jax"


def table(summary: dict) -> Table:
    """A row for each case; the header has how many of them each framework gets right.

    A cell is "-" where the framework lacks the feature, and empty where it is not installed.
    """
    frameworks = summary["frameworks"]
    header = ["case", "true value", *map(_score, frameworks)]
    rows = [
        [f"{c['number']} {c['title']}", _true(c), *(_cell(c, f) for f in frameworks)]
        for c in _cases(summary)
    ]
    return Table("", header, rows)


def markdown_page(summary: dict, config: dict, question: str) -> str:
    """The whole report in Markdown.

    Args:
      summary: of summary.json.
      config: of config.json; the command and the versions are shown.
      question: the title.
    """
    notes = [
        f"### {d['number']}. {d['title']}\n\n{d['note']}\n\n"
        + "".join(f"- {line}\n" for line in map(_measured, d["cases"]))
        for d in summary["defects"]
    ]
    cases = table(summary)
    parts = [
        f"# {question}\n",
        f"{_introduction(summary)}\n",
        f"```\n{config['command']}\n```\n\n{_versions(config)}\n",
        markdown.table(cases.header, cases.rows),
        f"{_legend()}\n",
        f"## Where {OURS} does not do better\n",
        "".join(f"- {line}\n" for line in _limits(summary)),
        "## The cases\n",
        *notes,
    ]
    return "\n".join(parts)


def html_page(summary: dict, config: dict, question: str) -> Page:
    """The report from the same arguments."""

    def plain(lines: Iterable[str]) -> list[str]:
        return [line.replace("`", "") for line in lines]

    notes = [
        Section(f"{d['number']}. {d['title']}", plain([d["note"], *map(_measured, d["cases"])]))
        for d in summary["defects"]
    ]
    limits = Section(f"Where {OURS} does not do better", plain(_limits(summary)))
    sections = [Section("The cases", plain([_legend()]), table(summary)), limits, *notes]
    return Page(question, sections, config, plain([_introduction(summary)]))


def _introduction(summary: dict) -> str:
    cases = _cases(summary)
    return (
        f"{len(cases)} small cases in which some released BatchNorm layer goes wrong, put to "
        f"{OURS} and to every peer that is installed, each used as its documentation says. "
        "NumPy makes the data (`experiments/defects`), and the true value from it "
        "in float64; "
        "every cell is measured by the command."
    )


def _legend() -> str:
    return (
        "A cross: wrong. `-`: the layer has no such feature. Empty: not installed. `error`: an "
        "exception, right where the true value is `error`, wrong where a number was due. "
        "`silent`: accepted without one. The heads of the columns say how many of its cases a "
        "layer gets right. What each case measures, and how close is right, is below."
    )


def _limits(summary: dict) -> list[str]:
    """What a reader should hold against the table."""
    cases = _cases(summary)
    lines = [
        "The cases were chosen because somebody is wrong in them. On a float32 batch of some "
        "dozens of shuffled examples, with no mask and a mean of the size of its standard "
        "deviation, all of these layers agree.",
    ]
    for ours, found in _otherwise(cases).items():
        given = ", ".join(
            f"{_number(c['by_default']['value'])} in {c['number']}" for c in found
        )
        lines.append(
            f"Measured with {ours}, and wrong without: the layer as it comes gives {given}."
        )
    for kind, found in (
        ("lacks what is asked in", [c for c in cases if OURS not in c["answers"]]),
        ("is wrong in", [c for c in cases if not _ours(c)["right"]]),
    ):
        if found:
            lines.append(f"{OURS} {kind} {', '.join(c['number'] for c in found)}.")
    return [
        *lines,
        "Sharing statistics over replicas takes two all-reduces by default; Flax's takes one.",
    ]


def _otherwise(cases: list[dict]) -> dict[str, list[dict]]:
    """The cases for which our layer is not used as it comes, by how it is used."""
    ways = dict.fromkeys(case["ours"] for case in cases if case["ours"])
    return {way: [case for case in cases if case["ours"] == way] for way in ways}


def _ours(case: dict) -> dict:
    return case["answers"].get(OURS, {"right": True})


def _cases(summary: dict) -> list[dict]:
    return [case for defect in summary["defects"] for case in defect["cases"]]


def _score(framework: dict) -> str:
    if not framework["installed"]:
        return f"{framework['name']}\nabsent"
    return f"{framework['name']}\n{framework['right']} of {framework['cases']}"


def _cell(case: dict, framework: dict) -> str:
    if not framework["installed"]:
        return ""
    answer = case["answers"].get(framework["name"])
    if answer is None:
        return "-"
    text = _number(answer["value"])
    return text if answer["right"] else Wrong(text)


def _true(case: dict) -> str:
    return _number(case["true"]) + ("\nor error" if case["or_refused"] else "")


def _measured(case: dict) -> str:
    """ "D1a, right within 0.001: measured.", and how errors and silences were."""
    within = f", right within {_number(case['tolerance'])}" if case["tolerance"] else ""
    text = f"{case['number']}{within}: {case['measured']}."
    details = {name: a["detail"] for name, a in case["answers"].items() if a["detail"]}
    return text + "".join(f" {name}: {detail}." for name, detail in details.items())


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else number(value)


def _versions(config: dict) -> str:
    shown = (f"{k} {v}" if v else f"{k} not installed" for k, v in config["versions"].items())
    return f"With {', '.join(shown)}, on {', '.join(config['devices'])}."
