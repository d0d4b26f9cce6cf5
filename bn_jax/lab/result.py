"""What a comparison returns: tables, sentences, figures, and where they are kept."""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from bn_jax.errors import UserError
from bn_jax.lab.report import figures as drawings
from bn_jax.lab.report import read_json, read_records
from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.page import write
from bn_jax.lab.report.sentences import speedup_lines
from bn_jax.lab.report.tables import summary_table
from bn_jax.lab.statistics import Record, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = tuple(
    f"{split}_{what}"
    for split in ("train", "validation", "test")
    for what in ("loss", "accuracy")
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    In a notebook its value shows the sentence, the table and the learning curves.

    Attributes:
      records: of the runs.
      summary: what `summary.json` holds.
      config: what `config.json` holds.
      folder: where it is kept.
    """

    records: tuple[Record, ...]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    folder: Path

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Reads the workdir of a finished comparison.

        Raises:
          UserError: there is none.
        """
        folder = Path(folder).expanduser()
        if not (folder / "summary.json").exists():
            raise UserError(f"{folder} holds no finished comparison")
        summary, config = (read_json(folder / f"{n}.json") for n in ("summary", "config"))
        if "speedup" not in summary:
            raise UserError(f"{folder} holds a {summary.get('experiment')}, no comparison")
        lines = read_records(folder / "records.jsonl")
        return cls(tuple(map(Record.from_json, lines)), summary, config, folder)

    @functools.cached_property
    def outcome(self) -> Outcome:
        """The statistics: `arms`, `speedups`, `same`, `points`."""
        return Outcome.of(self.summary)

    @property
    def arms(self):
        """Each arm at its own best point: `bn_jax.lab.statistics.ArmResult`s."""
        return self.outcome.arms

    @property
    def speedups(self):
        """Each arm beside the baseline: `bn_jax.lab.statistics.summary.Speedup`s."""
        return self.outcome.speedups

    @property
    def sentences(self) -> list[str]:
        """What was found, in words that claim no more than was measured."""
        return speedup_lines(self.outcome)

    @property
    def frame(self) -> pd.DataFrame:
        """A row for each arm at its best point; `_low` and `_high` are ends of intervals."""
        return pd.DataFrame([_flat(arm.to_json()) for arm in self.arms])

    @property
    def records_frame(self) -> pd.DataFrame:
        """A row for each evaluation of each run."""
        return records_frame(self.records)

    @property
    def figures(self) -> dict[str, Figure]:
        """The figures by name, drawn anew."""
        drawn = drawings.of_comparison(self.records, self.outcome)
        return {Path(name).stem: figure for name, _, figure in drawn}

    def save(self, folder: str | Path, formats: Sequence[str] = ("png", "svg")) -> None:
        """Writes the figures in each format, `arms.csv` and `records.csv` into a folder."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in self.figures.items():
            for kind in formats:
                figure.savefig(folder / f"{name}.{kind}", dpi=180)
        self.frame.to_csv(folder / "arms.csv", index=False)
        self.records_frame.to_csv(folder / "records.csv", index=False)

    def _repr_html_(self) -> str:
        table = summary_table(self.outcome)
        cells = [dict(zip(table.header, row, strict=True)) for row in table.rows]
        shown = pd.DataFrame(cells).to_html(index=False, border=0).replace("\\n", "<br>")
        png = io.BytesIO()
        self.figures["learning_curves"].savefig(png, dpi=100)
        image = base64.b64encode(png.getvalue()).decode()
        text = "".join(f"<p>{html.escape(line)}</p>" for line in self.sentences)
        where = html.escape(str(self.folder / "report.html"))
        curves = f'<img alt="learning curves" src="data:image/png;base64,{image}">'
        return f"{text}{shown}{curves}<p>{where}</p>"


def records_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Returns a row for each evaluation of each run."""
    rows = [
        {"arm": r.arm, **r.point._asdict(), "seed": r.seed, "step": step}
        | {name: getattr(r, name)[i] for name in SERIES}
        for r in records
        for i, step in enumerate(r.steps)
    ]
    floats = dict.fromkeys(("momentum", *SERIES), float)
    return pd.DataFrame(rows).astype(floats)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            low, high = value["ci95"]
            found |= {name: value["median"], f"{name}_low": low, f"{name}_high": high}
        else:
            found[name] = value
    return found


def load(folder: str | Path) -> Comparison:
    """Reads a finished comparison from its workdir."""
    return Comparison.load(folder)


def join(
    first: Comparison,
    second: Comparison,
    *,
    names: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
) -> Comparison:
    """Puts the runs of two comparisons into one, with the baseline and target of the first.

    Args:
      first, second: of the same task.
      names: new names for arms of the second; an arm that is in both needs one, unless its
        seeds or rates are others.
      folder: for the result; by default runs/joined/<time>.

    Raises:
      UserError: the targets or the budgets differ, or a run is in both.
    """
    a, b = first.outcome, second.outcome
    if a.target.value != b.target.value:
        raise UserError(
            f"the targets differ, {a.target.value:g} and {b.target.value:g}: give both "
            "comparisons the same target"
        )
    if a.budget != b.budget:
        raise UserError(f"the budgets differ, {a.budget:,} and {b.budget:,} steps")
    renamed = [
        dataclasses.replace(r, arm=(names or {}).get(r.arm, r.arm)) for r in second.records
    ]
    runs = {r.run for r in first.records}
    if double := [r.arm for r in renamed if r.run in runs]:
        raise UserError(f"arm {double[0]} has the same runs in both: rename it, names={{...}}")
    records = (*first.records, *renamed)
    found = summarize(records, baseline=a.arms[0].arm, target=a.target.value)
    counts = {arm.arm: arm.seeds for arm in found.arms}
    shared = ("experiment", "question", "dataset", "model", "measure")
    about = {k: first.summary[k] for k in shared if k in first.summary}
    seeds = ", ".join(f"{arm} {n}" for arm, n in counts.items())
    note = {} if len({*counts.values()}) == 1 else {"seeds": f"unequal: {seeds}"}
    summary = json.loads(json.dumps(about | found.to_json() | note))
    folder = Path(folder or Path("runs/joined") / time.strftime("%Y%m%d-%H%M%S")).expanduser()
    folder.mkdir(parents=True)
    lines = (json.dumps(record.to_json()) + "\n" for record in records)
    (folder / "records.jsonl").write_text("".join(lines))
    config = {"flags": first.config["flags"], "joined": [str(first.folder), str(second.folder)]}
    write(records, summary, config, folder)
    return Comparison.load(folder)
