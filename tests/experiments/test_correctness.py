"""The table of correctness from its command line: what it leaves behind, and how it fails."""

import io
import json
import os
from contextlib import redirect_stdout

import pytest

from bn_jax.report import read_records
from experiments import correctness, defects

CORRECTNESS = """
from experiments import correctness, flags
flags.main(correctness.Config, correctness.run)
"""
LEFT = ["config.json", "correctness.md", "records.jsonl", "report.html", "summary.json"]
HERE = {"bn_jax", "flax linen", "flax nnx"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two defects with the frameworks that are always there: summary, output, folder."""
    folder, few = tmp_path_factory.mktemp("correctness"), defects.defects()
    config = correctness.Config(workdir=str(folder / "w"), markdown=str(folder / "doc.md"))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as written:
        patch.setattr(defects, "defects", lambda: [few[0], few[5]])
        for module in (defects, defects.case):
            patch.setattr(module, "installed", HERE.__contains__)
        summary = correctness.run(config)
    return summary, written.getvalue(), folder


def test_it_leaves_five_things_and_the_document(finished):
    summary, written, folder = finished
    assert sorted(os.listdir(folder / "w")) == LEFT
    assert json.loads((folder / "w/summary.json").read_text()) == summary
    assert (folder / "doc.md").read_text() == (folder / "w/correctness.md").read_text()
    table, _, page = written.rstrip().rpartition("\n")
    assert page == str(folder / "w/report.html")
    for title in ("bn_jax", "6 of 6", "D1a", "D6d", "NaN x"):
        assert title in table


def test_the_records_and_the_counts_are_those_of_the_answers(finished):
    summary, _, folder = finished
    records = read_records(folder / "w/records.jsonl")
    asked = {(r["case"], r["framework"]) for r in records}
    numbers = ("D1a", "D1b", "D6a", "D6b", "D6c", "D6d")
    assert asked == {(n, f) for n in numbers for f in HERE}
    for framework in summary["frameworks"]:
        given = [r["right"] for r in records if r["framework"] == framework["name"]]
        assert (framework["right"], framework["cases"]) == (sum(given), len(given))
        assert framework["installed"] == (framework["name"] in HERE)
    cases = [case for defect in summary["defects"] for case in defect["cases"]]
    for r in records:
        (case,) = [case for case in cases if case["number"] == r["case"]]
        assert case["answers"][r["framework"]]["value"] == r["value"]


def test_the_config_has_the_versions_of_the_peers_and_the_command(finished):
    _, _, folder = finished
    config = json.loads((folder / "w/config.json").read_text())
    assert set(config["versions"]) == {"python", *correctness.PACKAGES}
    assert config["versions"]["jax"] is not None
    command = f"python -m experiments.correctness --markdown={folder}/doc.md"
    assert config["command"] == command
    for page in ("correctness.md", "report.html"):
        assert command in (folder / "w" / page).read_text()


def test_a_missing_folder_is_refused_before_anything_is_measured(server, tmp_path):
    arguments = (f"--markdown={tmp_path}/none/doc.md", f"--workdir={tmp_path}/w")
    message = server.run(*arguments, code=CORRECTNESS).error()
    assert message == f"--markdown={tmp_path}/none/doc.md: there is no such folder"
    assert not (tmp_path / "w").exists()


def test_another_run_is_not_overwritten(server, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    message = server.run(f"--workdir={tmp_path}", code=CORRECTNESS).error()
    assert "holds another run" in message
    assert (tmp_path / "config.json").read_text() == "mine"
