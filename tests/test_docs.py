"""Links in the documentation lead somewhere, tests that it names are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[([^]]*)\]\(([^)#]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links(page):
    for text, target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file = page.parent / target
        assert file.exists(), target
        if text.startswith("test_") and text != file.stem:
            assert f"def {text}(" in file.read_text(encoding="utf-8"), (text, target)


def test_every_feature_has_a_test_or_says_what_is_missing():
    rows = re.findall(
        r"^\| (\d+) [^|]*\| ([^|]*)\|", (ROOT / "docs/features.md").read_text(), re.M
    )
    assert [int(number) for number, _ in rows] == list(range(1, 60))
    for number, ours in rows:
        mark, rest = ours[0], ours[1:].strip(" ,")
        assert mark in "YPN", number
        assert "../tests/" in ours if mark == "Y" else rest, number
