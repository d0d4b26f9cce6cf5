"""The page: well-formed, self-contained, escaped, and with the numbers on it."""

import json
from html.parser import HTMLParser

import pytest

from bn_jax import report

VOID = {"meta", "img", "br", "hr", "link", "input"}
QUESTION = "Does it train faster?"


class Checker(HTMLParser):
    """Collects text, tags and references; fails on a tag closed out of turn."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]
        assert not any(k.startswith("on") for k, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def build(made, config, folder, question=QUESTION):
    records, summary = made
    paths = report.save_all(records, summary, folder)
    figures = list(zip(report.captions(summary), paths, strict=True))
    return report.html_page(summary, config, figures, question)


@pytest.mark.parametrize(
    "case",
    [{"arms": ("none", "bn", "layer", "group")}, {"arms": ("bn",), "rates": (0.1,), "seeds": 1},
     {"lost": True, "rates": (0.1, 1.0)}, {"scales": (1.0, 2.0), "rates": (0.1, 0.3)}],
)  # fmt: skip
def test_page_is_whole_and_alone(make, config, tmp_path, case):
    page = build(make(**case), config, tmp_path)
    found = parse(page)
    figures = 1 if case.get("rates") == (0.1,) else 3  # against rates where there are several
    assert found.tags.count("img") == figures
    assert len(found.references) == figures
    assert all(r.startswith("data:image/png;base64,iVBOR") for r in found.references)
    assert not {"script", "link", "iframe", "a"} & set(found.tags)
    for outside in ("url(", "@import", "http:", "https:"):
        assert outside not in page


def test_page_answers_the_question(make, config, tmp_path):
    records, summary = make()
    text = " ".join(parse(build((records, summary), config, tmp_path)).text)
    text = " ".join(text.split())
    assert text.startswith(QUESTION)
    for line in report.speedup_lines(summary):
        assert line.split(": ", 1)[1] in text
    assert (
        "Measured on digits, mlp with 5 seeds at each of 7 learning rates (0.001 to 1)" in text
    )
    assert "The target is test accuracy 95 % (given)." in text
    assert "here 20 steps" in text
    for cell in (cell for row in report.summary_rows(summary)[1] for cell in row):
        assert all(line in text for line in cell.split("\n"))


def test_page_says_how_the_target_was_chosen(make, config):
    _, summary = make(rates=(0.1,), seeds=1)
    summary["target"]["chosen"] = "best of the baseline"
    page = report.html_page(summary, config, [], QUESTION)
    assert "(best of the baseline, none)" in page
    assert "<dt>target</dt>" in page


def test_page_shows_the_whole_config(make, config):
    config["more"] = {"precision": 0.123456, "empty": {}, "nothing": []}
    text = parse(report.html_page(make(seeds=1)[1], config, [], QUESTION)).text
    assert config["command"] in text
    for shown in ("jax", "0.10.2", "cpu", "git commit", "41.2", "precision", "0.123456",
                  "0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1"):  # fmt: skip
        assert shown in text


def test_page_with_nothing_but_a_summary(make):
    _, summary = make(rates=(0.1,), seeds=1)
    summary["at_same_learning_rate"] = None
    found = parse(report.html_page(summary, {}, [], QUESTION))
    assert "Settings" not in found.text
    assert "All arms at the same learning rate" not in found.text


def test_everything_is_escaped(make, config, tmp_path):
    evil = "<b>\"&'</b><script>"
    records, summary = make(arms=("none", evil), rates=(0.1,), seeds=1)
    summary |= {"dataset": evil, "model": evil}
    summary["target"]["chosen"] = evil
    config |= {"command": evil, "flags": {evil: evil, "list": [evil]}, evil: {evil: evil}}
    page = build((records, summary), config, tmp_path, question=evil)
    caption_only = report.html_page(
        summary, config, [(evil, tmp_path / "learning_curves.png")], evil
    )
    for html in (page, caption_only):
        found = parse(html)
        assert found.tags.count("script") == 0
        assert found.tags.count("b") == html.count("<figcaption><b>")
        assert found.text.count(evil) >= 5


def test_light_dark_print_and_phone(make):
    page = report.html_page(make(rates=(0.1,), seeds=1)[1], {}, [], QUESTION)
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 36rem", "viewport"):
        assert rule in page


def test_write_leaves_a_whole_folder(make, config, tmp_path):
    records, summary = make(rates=(0.1, 0.3), seeds=2)
    page = report.write(records, summary, config, tmp_path, QUESTION)
    assert page == tmp_path / "report.html"
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "figures", "report.html", "summary.json",
    ]  # fmt: skip
    parse(page.read_text())


def test_write_refuses_what_json_lacks(make, config, tmp_path):
    records, summary = make(rates=(0.1,), seeds=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(records, summary | {"x": float("nan")}, config, tmp_path, QUESTION)
    assert not (tmp_path / "summary.json").exists()
