"""The examples of docs/recipes.md, run from top to bottom."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/recipes.md"
SECTION = re.compile(r"^## (\w+)", re.M)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def test_the_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "recipes"}
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == 1 + len(SECTION.findall(text))
    for block in blocks:
        # Blank lines in front, so that a traceback has the lines of the page.
        above = "\n" * (text[: block.start(1)].count("\n"))
        exec(compile(above + block[1], PAGE, "exec"), namespace)


@pytest.mark.parametrize("command", re.findall(r"`python -m (\S+)`", PAGE.read_text()))
def test_the_commands_are_there(command):
    assert (PAGE.parents[1] / f"{command.replace('.', '/')}.py").is_file()
