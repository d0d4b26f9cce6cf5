"""Finished experiments as one page of Markdown: question, command, numbers, figures."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.files import write_atomically
from bn_jax.lab.report.markdown import sections, table
from bn_jax.lab.report.sentences import speedup_lines
from bn_jax.lab.report.tables import Table, own_tables, published_table, summary_table
from bn_jax.lab.report.text import plural, subject

AGREEING = "published claims that agree, of those judged"
NOT_JUDGED = (
    "Not judged: rows with something published and no answer. The run is smaller than the "
    "source's, of other data or of another setting, or its numbers cannot tell."
)
WIDTH, COLORS = 1000, 64  # of a figure in the page: some 40 kB


class Finished(NamedTuple):
    """What an experiment left.

    Attributes:
      summary, config: of summary.json and config.json.
      captions: by the name of the figure's file.
      folder: where the figures are.
    """

    summary: dict
    config: dict
    captions: dict[str, str]
    folder: Path

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self.summary["experiment"]

    @property
    def subject(self) -> str:
        """What was trained on what."""
        return f"{self.name} ({subject(self.summary)})"

    @property
    def title(self) -> str:
        """Of its section."""
        return f"{self.subject}: {self.summary['question']}"


INTRODUCTION = """\
# Results

What experiments of `experiments/` found here, with the numbers of their sources beside ours.
Medians over seeds with their 95 % intervals (percentile bootstrap); a run that does not
reach a target counts as never; a run that diverged is counted. How each number is defined:
[method.md](method.md). Seconds are of a machine that may have done other things besides:
compare them within one experiment. `cifar10` was a copy of CIFAR-10 that had been encoded anew
as JPEG: its accuracies compare with each other, not with those on the original. This page is
written by `python -m experiments.make_report` from the folders that the commands below leave.
"""


def page(
    finished: Sequence[Finished], figures: Path, link: str,
    order: Sequence[str] = (), before: str = "",
) -> str:  # fmt: skip
    """The page; the figures are written, smaller, into a folder.

    Args:
      finished: of any number of experiments.
      figures: the folder.
      link: to that folder from the page.
      order: of the experiments on the page, by name.
      before: the page as it is. What it has of other subjects than `finished` stays.
    """
    found = _sections(before) | {
        f.subject: (_contents_row(f), section(f, figures, link)) for f in finished
    }
    places = {name: i for i, name in enumerate(order)}
    ordered = sorted(found, key=lambda s: places.get(s.partition(" (")[0], len(places)))
    rows, texts = zip(*(found[about] for about in ordered), strict=True)
    contents = table(["experiment", AGREEING, "seeds", "machine"], rows)
    return "\n".join([INTRODUCTION, contents, *texts])


def _sections(before):
    """By subject the row of the contents and the section, with its heading."""
    lines = [line for line in before.splitlines() if line.startswith("| [")]
    rows = {line[3:].partition("](")[0]: line[2:-2].split(" | ") for line in lines}
    found = {}
    for title, text in sections(before).items():
        about = title.partition(": ")[0]
        if about in rows:
            found[about] = rows[about], f"## {title}\n{text.rstrip()}\n"
    return found


def section(finished: Finished, figures: Path, link: str) -> str:
    """One experiment."""
    summary = finished.summary
    parts = [
        f"## {finished.title}",
        f"```\n{finished.config['command']}\n```\n{_spent(finished)}",
    ]
    if "speedup" in summary:
        comparison = Outcome.of(summary)
        parts += [f"{comparison.headline}.", _markdown(summary_table(comparison))]
        parts += speedup_lines(comparison)
    for one in own_tables(summary):
        parts += [f"{one.title}:", _markdown(one)]
    if published := published_table(summary):
        parts += ["Beside the source:\n", _markdown(published)]
        parts += [NOT_JUDGED] if None in _answers(summary) else []
        parts += _reasons(summary)
    for name, caption in finished.captions.items():
        path = f"{link}/{_shrunk(finished, name, figures)}"
        parts.append(f"![{caption.partition('. ')[0]}]({path})\n*{caption}*")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _markdown(shown: Table) -> str:
    return table(shown.header, shown.rows)


def _contents_row(finished):
    summary = finished.summary
    said = _answers(summary)
    judged = [answer for answer in said if answer is not None]
    seeds = finished.config["flags"].get("seeds")
    title = f"[{finished.subject}](#{_anchor(finished)})"
    without = "not judged" if said else "nothing published"
    agree = f"{sum(judged)} of {len(judged)}" if judged else without
    return [title, agree, str(seeds or ""), ", ".join(finished.config.get("devices", ()))]


def _anchor(finished):
    """As GitHub makes it of the heading."""
    return "".join(c for c in finished.title.lower() if c.isalnum() or c in " _-").replace(
        " ", "-"
    )


def _spent(finished):
    seconds = (finished.summary.get("seconds") or {}).get("total")
    versions = finished.config.get("versions", {})
    known = ", ".join(f"{k} {versions[k]}" for k in ("jax", "flax") if versions.get(k))
    return (
        f"Took {plural(round(seconds), 'second')} with {known}."
        if seconds
        else f"With {known}."
    )


def _answers(summary):
    """Whether each claim of a source agrees; a row without `agrees` tells a setting."""
    published = (row for row in summary.get("published", ()) if row["source"])
    return [row["agrees"] for row in published if "agrees" in row]


def _reasons(summary):
    """Where a number does not agree, what was found to be the reason."""
    disagreeing = [row for row in summary["published"] if row.get("agrees") is False]
    reasons = dict.fromkeys(row.get("reason") for row in disagreeing)
    named = []
    for reason in reasons:
        which = [row["quantity"] for row in disagreeing if row.get("reason") == reason]
        named.append(f"- {'; '.join(which)}. {reason or 'The reason was not found.'}")
    return ["Where they do not agree:\n\n" + "\n".join(named)] if named else []


def _shrunk(finished, name, figures):
    """Writes the figure with fewer pixels and colours; the name of its file."""

    words = [finished.name, *subject(finished.summary).split(", "), name]
    path = figures / re.sub(r"[^\w.]+", "-", "_".join(words))
    with Image.open(finished.folder / "figures" / name) as image:
        image = image.convert("RGB")
        image.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.quantize(COLORS, dither=Image.Dither.NONE).save(content, "png", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return path.name
