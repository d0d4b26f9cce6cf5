"""Pieces of HTML. Every text that comes in is escaped here, and only here."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from bn_jax.report.text import Wrong

CSS = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --faint: #59636e; --line: #d5dae0; --paper: #ffffff; --raised: #f4f6f8;
  --accent: #0072b2; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e9ec; --faint: #a2abb5; --line: #3a4149; --paper: #15181b; --raised: #20252a;
  --accent: #56b4e9; --wrong: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 56rem; color: var(--ink);
  background: var(--paper); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; }
p { margin: .5rem 0; max-width: 44rem; }
.answer { padding: .75rem 1rem; background: var(--raised); font-size: 1.1rem;
  border-left: .25rem solid var(--accent); }
.answer p { margin: .25rem 0; }
.note, figcaption { color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .55rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--ink); line-height: 1.25; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
td { white-space: nowrap; }
th small, td small { display: block; color: var(--faint); font-weight: 400; }
td.wrong { color: var(--wrong); font-weight: 600; }
figure { margin: 1.5rem 0 2.25rem; }
figure img { display: block; width: 100%; max-width: 40rem; height: auto; padding: .5rem;
  background: #ffffff; border: 1px solid var(--line); border-radius: .35rem; }
figcaption { max-width: 40rem; padding-top: .6rem; }
figcaption b { color: var(--ink); }
dl { display: grid; grid-template-columns: minmax(8rem, 12rem) 1fr; gap: .35rem 1rem;
  margin: .5rem 0; font-size: .92rem; }
dt { color: var(--faint); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
dd dl { margin: 0; grid-template-columns: minmax(5rem, 8rem) 1fr; }
pre { padding: .75rem 1rem; background: var(--raised); white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .88rem; border-radius: .35rem; }
@media (max-width: 36rem) {
  body { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  dl, dd dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  figure img { width: 34rem; max-width: none; }
}
@media print {
  :root { color-scheme: light; --ink: #000000; --faint: #444444; --line: #bbbbbb;
    --paper: #ffffff; --raised: #ffffff; --wrong: #000000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, dl { break-inside: avoid; }
  h2 { break-after: avoid; }
  table { font-size: 8pt; }
  figure img { max-width: 13cm; }
}
"""


def document(title: str, parts: list[str]) -> str:
    """A whole page that refers to nothing outside itself."""
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def heading(text: str) -> str:
    """The title of the page, on the page."""
    return f"<h1>{_text(text)}</h1>"


def block(kind: str, *parts: str) -> str:
    """Parts in a box; `kind` is a class of the style sheet."""
    return f'<div class="{kind}">\n' + "\n".join(parts) + "\n</div>"


def section(title: str, *parts: str) -> str:
    """A heading of the second level and what comes below it; "" where nothing does."""
    inner = "\n".join(part for part in parts if part)
    if not inner:
        return ""
    return f"<section>\n<h2>{_text(title)}</h2>\n{inner}\n</section>"


def code(text: str) -> str:
    """Text to be typed as it is; "" for none."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def paragraph(text: str, kind: str = "") -> str:
    """`kind` is a class of the style sheet."""
    return f'<p class="{kind}">{_text(text)}</p>' if kind else f"<p>{_text(text)}</p>"


def table(caption: str, header: list[str], rows: list[list[str]]) -> str:
    """The first cell of a row names it; the second line of a cell is set small.

    A cell that is `Wrong` has a colour and a cross.
    """
    head = "".join(f'<th scope="col">{_cell(title)}</th>' for title in header)
    lines = "\n".join(f"<tr>{_row(row)}</tr>" for row in rows)
    return (
        f'{paragraph(caption, "note")}\n<div class="wide">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n</div>"
    )


def figure(caption: str, image: Path) -> str:
    """The PNG within the page; the first sentence of the caption is its title."""
    title, stop, rest = caption.partition(". ")
    text = f"<b>{_text(title + stop.strip())}</b> {_text(rest)}"
    data = base64.b64encode(Path(image).read_bytes()).decode("ascii")
    return (
        f'<figure>\n<div class="wide"><img alt="{_text(title)}" '
        f'src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{text}</figcaption>\n</figure>"
    )


def definitions(items: dict) -> str:
    """A list of names and what they stand for, nested where a value is a dict."""
    pairs = "\n".join(
        f"<dt>{_text(str(name))}</dt><dd>{_value(value)}</dd>" for name, value in items.items()
    )
    return f"<dl>\n{pairs}\n</dl>" if items else ""


def _text(text: str) -> str:
    """Escaped, and no line break between a number and its per cent sign."""
    return escape(text).replace(" %", "&nbsp;%")


def _row(row: list[str]) -> str:
    name, *cells = row
    return f'<th scope="row">{_cell(name)}</th>' + "".join(map(_column, cells))


def _column(text: str) -> str:
    if isinstance(text, Wrong):
        return f'<td class="wrong">{_cell(text)} ✗</td>'
    return f"<td>{_cell(text)}</td>"


def _cell(text: str) -> str:
    first, *rest = text.split("\n")
    return _text(first) + "".join(f"<small>{_text(line)}</small>" for line in rest)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return definitions(value) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_value(v) for v in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return "-"
    return _text(str(value))
