"""The page: well-formed, self-contained, escaped, and with the numbers on it."""

import json
from html.parser import HTMLParser

import pytest

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.page import Figure, Page, Section, page_of, render, write
from bn_jax.lab.report.sentences import speedup_lines
from bn_jax.lab.report.tables import Table, Wrong, same_rate_table, summary_table

VOID = {"meta", "img"}


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
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def parse(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def words(page):
    """The text of a page in one line."""
    return " ".join(" ".join(parse(page).text).split())


@pytest.mark.parametrize(
    ("case", "figures"),
    [({"arms": ("none", "bn", "layer", "group"), "rates": (0.1, 0.3)}, 3),
     ({"arms": ("bn",), "rates": (0.1,), "seeds": 1}, 1)],
)  # fmt: skip
def test_a_page_is_whole_and_alone(make, config, tmp_path, case, figures):
    page = write(*make(**case), config, tmp_path).read_text()
    found = parse(page)
    assert found.tags.count("img") == len(found.references) == figures
    assert all(r.startswith("data:image/png;base64,iVBOR") for r in found.references)
    assert not {"script", "link", "iframe", "a"} & set(found.tags)
    for outside in ("url(", "@import", "http:", "https:"):
        assert outside not in page


def test_a_page_answers_the_question(make, config):
    _, summary = make()
    comparison = Outcome.of(summary)
    text = words(render(page_of(summary, config, [])))
    assert text.count("Which?") == 2  # in the tab and on the page
    for line in speedup_lines(comparison):
        assert line.split(": ", 1)[-1] in text
    assert (
        "Measured on digits, mlp with 3 seeds at each of 7 learning rates (0.001 to 1)" in text
    )
    assert "The target is test accuracy 95 % (given)." in text
    assert "here 20 steps" in text
    for table in (summary_table(comparison), same_rate_table(comparison)):
        for row in table.rows:
            assert " ".join(" ".join(row).split()) in text


def test_a_page_says_how_the_target_was_chosen(make):
    page = render(page_of(make(rates=(0.1,), target=None)[1], {}, []))
    assert "(best of the baseline, none)" in page
    assert "<dt>target</dt>" in page


def test_a_page_shows_the_whole_config(make, config):
    config["more"] = {"precision": 0.123456, "empty": {}, "nothing": []}
    text = words(render(page_of(make(rates=(0.1,))[1], config, [])))
    assert text.endswith(config["command"])
    for shown in ("jax 0.10.2", "devices cpu", "git commit -", "total 41.2", "empty none",
                  "precision 0.123456", "nothing none", "quick False",
                  "0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1"):  # fmt: skip
        assert shown in text


def test_a_page_of_own_tables(make, config):
    rows = [{"quantity": "q", "here": "1", "source": "2", "agrees": False}]
    tables = [{"title": "Mine", "header": ["a", "b"], "rows": [["c", "d\ne"]]}]
    about = {"question": "Which?", "dataset": "digits", "model": "mlp"}
    text = words(render(page_of(about | {"published": rows, "tables": tables}, config, [])))
    assert "Measured on digits, mlp." in text
    assert "here published agrees q 1 2 no" in text
    assert "Mine a b c d e" in text
    text = words(render(page_of(about, {}, [])))
    assert text == "Which? Which? Measured on digits, mlp."  # no section without content


def test_everything_is_escaped():
    evil = "<b>\"&'</b><script>"
    parts = Section(
        evil, [evil], Table(evil, [evil, evil], [[evil, evil], [evil, Wrong(evil)]], evil),
        [Figure("a.png", f"{evil}. {evil}", b"")], {evil: {evil: [evil]}},
    )  # fmt: skip
    config = {"command": evil, "flags": {evil: evil}, evil: evil}
    page = render(Page(evil, [parts], config, [evil], [evil]))
    found = parse(page)
    assert found.tags.count("script") == 0
    assert found.tags.count("b") == 1  # of the caption
    assert sum(text.count(evil) for text in found.text) == 23
    assert '<td class="wrong">&lt;b&gt;' in page


def test_a_wrong_cell_has_a_cross_and_the_second_line_is_small():
    table = Table("", ["a", "b\nc"], [["n", "1"], ["m", Wrong("2")]])
    page = render(Page("", [Section("", table=table)], {}))
    assert '<th scope="col">b<small>c</small></th>' in page
    assert "<td>1</td>" in page
    assert '<td class="wrong">2 ✗</td>' in page
    assert page.count("✗") == 1


def test_write_leaves_a_whole_folder(make, config, tmp_path):
    records, summary = make(rates=(0.1,))
    assert write(records, summary, config, tmp_path) == tmp_path / "report.html"
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert json.loads((tmp_path / "config.json").read_text()) == config
    left = {"config.json", "figures", "report.html", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_write_refuses_what_json_lacks(make, config, tmp_path):
    records, summary = make(rates=(0.1,))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(records, summary | {"x": float("nan")}, config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
