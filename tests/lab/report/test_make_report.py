"""docs/results.md: each experiment's question, command, numbers and figures, and no others."""

import json

import pytest

from bn_jax.errors import UserError
from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.page import write
from bn_jax.lab.report.sentences import speedup_lines
from experiments import make_report
from experiments.make_report_page import Finished, page

ROWS = [
    {"quantity": "epochs", "here": "18", "source": "within 20", "agrees": True},
    {"quantity": "accuracy", "here": ".7", "source": ".9", "agrees": False, "reason": "Small."},
    {"quantity": "loss", "here": "1", "source": "2", "agrees": False, "reason": "Small."},
    {"quantity": "more", "here": "3", "source": None, "agrees": None},
]


@pytest.fixture
def finished(make, tmp_path):
    """The folder of runs of two experiments, the older run of one with another command."""

    def leave(name, run, command, variant=None, **options):
        folder = tmp_path / "runs" / name / run
        folder.mkdir(parents=True)
        records, summary = make(**options)
        question = f"Is {name} right?"
        summary |= {"experiment": name, "question": question, "published": ROWS}
        summary |= {"variant": variant} if variant else {}
        config = {
            "command": command, "flags": {"seeds": 3}, "devices": ["cpu: cpu"],
            "versions": {"jax": "1.2.3", "flax": "4.5.6"},
        }  # fmt: skip
        write(records, summary, config, folder)

    leave("circles", "old", "python -m experiments.circles --seeds=1", rates=(0.1,), seeds=2)
    leave("circles", "new", "python -m experiments.circles", rates=(0.1,), seeds=2)
    leave("lstm", "a", "python -m experiments.lstm", rates=(0.1, 0.3), seeds=2)
    pixels = "python -m experiments.lstm --read=pixels"
    leave("lstm", "b", pixels, variant="pixels, permuted", rates=(0.1,), seeds=2)
    return tmp_path


def test_the_page(finished):
    out = finished / "docs" / "results.md"
    make_report.run(make_report.Config(runs=str(finished / "runs"), out=str(out)))
    text = out.read_text()
    assert text.count("\n## ") == 3
    assert "## lstm (digits, mlp): Is lstm right?" in text
    assert "## lstm (digits, mlp, pixels, permuted): Is lstm right?" in text
    assert "## circles (digits, mlp): Is circles right?" in text
    assert "python -m experiments.circles\n" in text
    assert "--seeds=1" not in text
    assert "| epochs | 18 | within 20 | yes |" in text
    assert "- accuracy; loss. Small." in text
    assert (
        "[circles (digits, mlp)](#circles-digits-mlp-is-circles-right) | 1 of 3 | 3 | cpu: cpu"
        in text
    )
    assert "jax 1.2.3, flax 4.5.6" in text
    summary = json.loads((finished / "runs/lstm/a/summary.json").read_text())
    for line in speedup_lines(Outcome.of(summary)):
        assert line in text
    links = [line.split("](")[1].split(")")[0] for line in text.splitlines() if "![" in line]
    # One rate: the learning curves alone. Two: three figures.
    assert len(set(links)) == len(links) == 5
    for link in links:
        assert (out.parent / link).stat().st_size < 100_000


CLAIM = {"quantity": "drift", "here": "2", "source": "smaller"}
WITHOUT = {"quantity": "more", "here": "3", "source": None, "agrees": None}


@pytest.mark.parametrize(
    ("rows", "contents", "unjudged"),
    [
        ([], "nothing published", False),
        ([WITHOUT], "nothing published", False),
        ([CLAIM], "nothing published", False),  # a setting: it has no `agrees`
        ([CLAIM | {"agrees": None}, WITHOUT], "not judged", True),
        ([CLAIM | {"agrees": None}, CLAIM | {"agrees": True}], "1 of 1", True),
        ([CLAIM | {"agrees": False}, CLAIM, WITHOUT], "0 of 1", False),
    ],
)
def test_what_is_not_judged_is_told_from_what_is_not_published(
    make, tmp_path, rows, contents, unjudged
):
    _, summary = make(rates=(0.1,), seeds=2)
    summary |= {"experiment": "circles", "question": "Right?", "published": rows}
    config = {"command": "python", "flags": {"seeds": 2}, "devices": ["gpu"]}
    text = page([Finished(summary, config, {}, tmp_path)], tmp_path, "")
    head, _, row = text[text.index("| experiment") :].splitlines()[:3]
    assert head == (
        "| experiment | published claims that agree, of those judged | seeds | machine |"
    )
    assert row.endswith(f"(#circles-digits-mlp-right) | {contents} | 2 | gpu |")
    assert text.count("\nNot judged: ") == unjudged


def test_what_the_page_has_of_others_stays(finished):
    whole, twice = finished / "whole.md", finished / "twice.md"
    make_report.run(make_report.Config(runs=str(finished / "runs"), out=str(whole)))
    runs = [str(finished / "runs" / run) for run in ("lstm/a", "lstm/b", "circles/old")]
    for some in (runs, [str(finished / "runs/circles/new")]):
        make_report.run(make_report.Config(workdirs=tuple(some), out=str(twice)))
    assert twice.read_text() == whole.read_text()


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        make_report.run(make_report.Config(runs=str(tmp_path)))
    with pytest.raises(UserError, match="not the folder of a finished run"):
        make_report.run(make_report.Config(workdirs=(str(tmp_path),)))
