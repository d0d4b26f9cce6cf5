"""One HTML page per experiment, and the folder around it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from bn_jax.lab.report import figures as drawings
from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.files import write_atomically
from bn_jax.lab.report.sentences import answer
from bn_jax.lab.report.tables import (
    Table,
    Wrong,
    own_tables,
    published_table,
    same_rate_table,
    summary_table,
)
from bn_jax.lab.report.text import number, plural, subject, whole
from bn_jax.lab.statistics import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

DPI = 180  # 1150 pixels for the 640 that a page gives a figure


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG; the first sentence of its caption is its title."""

    name: str
    caption: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what comes below it; a section without content is left out."""

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[Figure] = ()
    terms: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Page:
    """What a page shows; of `config.json` all that it has."""

    title: str
    sections: Sequence[Section]
    config: Mapping[str, Any]
    text: Sequence[str] = ()
    answer: Sequence[str] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The flags."""
        return self.config.get("flags") or {}

    @property
    def command(self) -> str:
        """The command that repeats the run."""
        return self.config.get("command") or ""

    @property
    def environment(self) -> Mapping[str, Any]:
        """All of the config that is not shown elsewhere."""
        shown = {k: v for k, v in self.config.items() if k not in ("flags", "command")}
        return {k.replace("_", " "): v for k, v in shown.items()}


def _unbroken(value: object) -> object:
    """No line break between a number and its per cent sign."""
    return value.replace(" %", "\xa0%") if type(value) is str else value


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
    undefined=jinja2.StrictUndefined, finalize=_unbroken,
)  # fmt: skip
ENVIRONMENT.filters["base64"] = lambda content: base64.b64encode(content).decode()
ENVIRONMENT.tests["wrong"] = lambda text: isinstance(text, Wrong)


def render(page: Page) -> str:
    """The page as one file: figures embedded, no script, nothing loaded from elsewhere."""
    return ENVIRONMENT.get_template("page.html").render(page=page)


def write(
    records: Sequence[Record],
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: str | Path,
    more: Sequence[tuple[str, str, Drawing]] = (),
) -> Path:
    """Writes config.json, summary.json, figures and report.html; the path of the last.

    `figures/captions.json` has the caption of every file beside it.

    Args:
      records: of the runs; their learning curves are drawn where `summary` compares arms.
      summary: its `question` is the title.
      config: of config.json; whatever it has is shown.
      folder: of the run.
      more: figures beyond those of every comparison: name of the file, caption, figure.

    Raises:
      ValueError: `summary` or `config` holds NaN or infinity, which JSON does not have.
    """
    folder = Path(folder)
    # The numbers first: they stay if a figure fails.
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", summary)
    drawn = [*more]
    if "speedup" in summary:
        drawn = [*drawings.of_comparison(records, Outcome.of(summary)), *more]
    figures = [save(folder / "figures" / name, text, f) for name, text, f in drawn]
    if figures:
        captions = {figure.name: figure.caption for figure in figures}
        write_json(folder / "figures" / "captions.json", captions)
    page = folder / "report.html"
    write_atomically(page, render(page_of(summary, config, figures)))
    return page


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object of JSON, indented; a ValueError where it holds NaN or infinity."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    write_atomically(path, text + "\n")


def save(path: Path, caption: str, drawing: Drawing) -> Figure:
    """Writes the figure as PNG, with the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    # Without the version of matplotlib, so that equal figures are equal files.
    drawing.savefig(png, dpi=DPI, metadata={"Software": None})
    write_atomically(path, png.getvalue())
    return Figure(path.name, caption, png.getvalue())


def page_of(
    summary: Mapping[str, Any], config: Mapping[str, Any], figures: Sequence[Figure]
) -> Page:
    """The page of an experiment, which compares arms with a baseline or has own `tables`."""
    shown, published = Section("Figures", figures=figures), published_table(summary)
    beside = [_section(published)] if published else []
    own = [_section(table) for table in own_tables(summary)]
    title = summary["question"]
    if "speedup" not in summary:
        measured = f"Measured on {subject(summary)}."
        return Page(title, [*beside, shown, *own], config, [measured])
    comparison = Outcome.of(summary)
    sections = [_section(summary_table(comparison)), *beside, shown, *own]
    if comparison.same and (same := same_rate_table(comparison)):
        sections.append(_section(same, answer(comparison.same)))
    every = (config.get("flags") or {}).get("eval_every")
    sections.append(Section("What the numbers mean", terms=_meanings(comparison, every)))
    return Page(title, sections, config, [_protocol(comparison)], answer(comparison))


def _section(table: Table, text: Sequence[str] = ()) -> Section:
    return Section(table.title, text, table)


def _protocol(comparison: Outcome) -> str:
    """What was run, in two sentences."""
    rates = comparison.rates
    seeds = max(arm.seeds for arm in comparison.arms)
    grid = f"learning rate {number(rates[0])}"
    if len(rates) > 1:
        ends = f"{number(rates[0])} to {number(rates[-1])}"
        grid = f"each of {len(rates)} learning rates ({ends})"
    return (
        f"Measured on {comparison.subject} with {plural(seeds, 'seed')} at {grid}, for at most "
        f"{whole(comparison.budget)} steps a run. The target is {comparison.goal}."
        + " Above, each arm has its own best learning rate."
        * bool(comparison.speedups)
    )


def _meanings(comparison: Outcome, every: int | None) -> dict[str, str]:
    resolution = f", here {plural(every, 'step')}" if every else ""
    meanings = {
        "steps to target": "The step of the first evaluation at or above the target, so it is "
        f"known to the distance between evaluations{resolution}.",
        "not reached": "A run that does not reach the target within the budget counts as "
        "never, and is not left out. Where half of the runs or more do not, there is no "
        "median; an interval is open (>, never) where the resampled median is never.",
        "95 % interval": "Percentile bootstrap over seeds of the median, or, where two arms "
        "are compared, of the ratio of their medians. The choice of the learning rate is not "
        "in it.",
        "times fewer, times more": "Ratio of the medians of two arms. It may be chance where "
        "the interval includes 1.",
        "seconds to target": "Time spent training, without compilation and evaluation. Where "
        "several runs are trained at once, their time is shared among them equally.",
        "best test accuracy": "The highest of a run's evaluations on the test set, so a "
        "little above what one would get without looking at the test set.",
        "final test accuracy": "At the last step of the budget; 0 % for a run that diverged.",
        "trains": "The median final test accuracy is at least 90 % of the target. Rates that "
        "train: the smallest and the largest of the grid that do.",
        "diverged": "A run whose loss stopped being a finite number.",
    }
    if "baseline" in comparison.target.chosen:
        meanings["target"] = (
            "The best of the baseline: at the learning rate at which it is most accurate on "
            "the validation set, the median over seeds of each run's best test accuracy."
        )
    return meanings
