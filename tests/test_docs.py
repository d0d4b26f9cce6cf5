"""What the documentation names is there: links, tests, modules, commands and paths."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[([^]]*)\]\(([^)#]+)\)")
NAME = re.compile(r"`(bn_jax(?:\.\w+)+)[^`\n]*`")
COMMAND = re.compile(r"python -m ((?:bn_jax|experiments|benchmarks)(?:\.\w+)+)(?![\w.])")
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|txt|toml))`")
pages = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


@pages
def test_links(page):
    for text, target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file = page.parent / target
        assert file.exists(), target
        if text.startswith("test_") and text != file.stem:
            assert f"def {text}(" in file.read_text(encoding="utf-8"), (text, target)


@pages
def test_names_commands_and_paths(page):
    text = page.read_text(encoding="utf-8")
    for name in NAME.findall(text):
        pkgutil.resolve_name(name)
    for command in COMMAND.findall(text):
        module = ROOT / command.replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), command
    for path in PATH.findall(text):
        assert (ROOT / path).exists() or (ROOT / "bn_jax" / path).exists(), path


def test_every_feature_has_a_test_or_says_what_is_missing():
    table = re.findall(r"^\| (.*) \|$", (ROOT / "docs/features.md").read_text(), re.M)
    rows = [row.split(" | ") for row in table[2:] if not row.startswith("**")]
    assert rows
    for feature, ours, *theirs in rows:
        assert re.match(r"Y.*\]\(\.\./tests/" if ours[0] == "Y" else r"[PN], \w", ours), feature
        assert len(theirs) == 6, feature
        assert all(re.match(r"[YPN-]", mark) for mark in theirs), feature
