"""Files of three experiments as an earlier version left them: the keys and numbers stay.

`pinned/` holds `config.json`, `records.jsonl` and `summary.json` of small runs on digits and
circles. A run today leaves the same, but for seconds; and it goes on with such a folder.
"""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

from bn_jax.lab import report
from bn_jax.lab.fields import kinds

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
PINNED = Path(__file__).with_name("pinned")
EXPERIMENTS = sorted(folder.name for folder in PINNED.iterdir())


def run(name, workdir):
    module = importlib.import_module(f"experiments.{name}")
    flags = report.read_json(PINNED / name / "config.json")["flags"] | {"workdir": str(workdir)}
    given = {k: v for k, v in flags.items() if k in kinds(module.Config)}
    return json.loads(json.dumps(module.run(module.Config(**given))))


def check_alike(here, there, path="", numbers=True):
    """The same keys in both, and nearly the same values but for times."""
    kinds = {type(here), type(there)}
    # Where numbers may differ, one of them may be missing.
    assert len(kinds) == 1 or kinds == {int, float} or not numbers, path
    if isinstance(here, dict):
        assert sorted(here) == sorted(there), path
        for key in there:
            if "seconds" not in key:
                check_alike(here[key], there[key], f"{path}.{key}", numbers)
    elif isinstance(here, list):
        assert len(here) == len(there), path
        for i, pair in enumerate(zip(here, there, strict=True)):
            check_alike(*pair, f"{path}[{i}]", numbers)
    elif isinstance(here, float):
        assert not numbers or here == pytest.approx(there, rel=1e-3, abs=1e-5), path
    elif isinstance(here, str):
        assert not numbers or NUMBER.sub("0", here) == NUMBER.sub("0", there), path
    else:
        assert not numbers or here == there, path


def summary_of(name):
    return report.read_json(PINNED / name / "summary.json")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_run_leaves_what_it_left(name, tmp_path):
    # In 300 steps with dropout the rounding of another processor grows to another run.
    numbers = name != "regularisation"
    check_alike(run(name, tmp_path), summary_of(name), numbers=numbers)
    check_alike(report.read_json(tmp_path / "summary.json"), summary_of(name), numbers=numbers)
    records = (report.read_records(p / "records.jsonl") for p in (tmp_path, PINNED / name))
    check_alike(*records, numbers=numbers)


def test_a_folder_of_an_earlier_version_is_gone_on_with(tmp_path):
    shutil.copytree(PINNED / "compare", tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "records.jsonl").read_bytes()
    check_alike(run("compare", tmp_path), summary_of("compare"))
    assert (tmp_path / "records.jsonl").read_bytes() == before
    assert (tmp_path / "report.html").exists()
