"""Which BatchNorm gives the right answer where another does not?

Asks bn_jax and every peer that is installed (Flax linen and nnx, Haiku, Equinox, torch,
Keras) the cases of the folder `defects`, holds each answer to the true value, and writes
the table to the terminal, to `report.html` and to `correctness.md`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.config import Workdir
from bn_jax.lab.fields import flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    from bn_jax.lab import report, workdir
    from bn_jax.lab.progress import Progress
    from bn_jax.lab.report.page import render, write_json
    from bn_jax.lab.report.terminal import print_table
    from experiments import correctness_page as pages
    from experiments import defects
    from experiments.defects import FRAMEWORKS, Case

EXPERIMENT = "correctness"
QUESTION = "Which BatchNorm is right where another is not?"
PACKAGES = ("jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "keras", "numpy")


@dataclasses.dataclass(frozen=True)
class Config(Workdir):
    """Every flag of the experiment; see `python -m experiments.correctness --help`."""

    markdown: str | None = flag(
        None, "file for the report in Markdown, as well as correctness.md of the workdir"
    )

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        if self.markdown and not Path(self.markdown).expanduser().parent.is_dir():
            raise UserError(f"--markdown={self.markdown}: there is no such folder")
        if self.markdown and Path(self.markdown).expanduser().is_dir():
            raise UserError(f"--markdown={self.markdown} is a folder: name a file in it")


def run(config: Config) -> dict[str, Any]:
    """Measures, fills the workdir, prints the table; what `summary.json` holds comes back."""
    with workdir.entered(config, EXPERIMENT) as (folder, _):
        if (finished := workdir.finished(folder)) is not None:
            return finished
        settings = workdir.write_config(
            folder, config, EXPERIMENT, versions=workdir.versions(PACKAGES)
        )
        summary = summarize(ask(folder / "records.jsonl"))
        write(config, summary, settings, folder)
        return summary


def write(config: Config, summary: dict, settings: dict, folder: Path) -> None:
    """Leaves the summary and the pages, and prints the table."""
    write_json(folder / "summary.json", summary)
    markdown = pages.markdown_page(summary, settings, QUESTION)
    report.write_atomically(folder / "correctness.md", markdown)
    if config.markdown:
        report.write_atomically(Path(config.markdown).expanduser(), markdown)
    page = render(pages.html_page(summary, settings, QUESTION))
    report.write_atomically(folder / "report.html", page)
    print_table(pages.table(summary))
    print(folder / "report.html")


def ask(path: Path) -> list[dict[str, Any]]:
    """Every framework's answers; each is in the file at `path` as soon as it is there.

    Those that an earlier start left there stay.
    """
    cases = [case for defect in defects.defects() for case in defect.cases]
    records = report.read_records(path) if path.exists() else []
    known = {(r["case"], r["framework"]) for r in records}
    with Progress(len(cases) * len(FRAMEWORKS)) as progress, report.open_records(path) as file:
        for framework in FRAMEWORKS:
            progress.describe(framework)
            for case in cases:
                new = (case.number, framework) not in known
                given = defects.answer(case, framework) if new else None
                if given is not None:
                    about = {"case": case.number, "framework": framework}
                    records.append(about | given._asdict())
                    report.append_record(file, records[-1])
                progress.advance(1)
    return records


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The cases with everybody's answers, and how many of them each framework gets right."""
    answers = {}
    for record in records:
        kept = {key: record[key] for key in ("value", "right", "detail")}
        answers.setdefault(record["case"], {})[record["framework"]] = kept
    given = {
        name: [r["right"] for r in records if r["framework"] == name] for name in FRAMEWORKS
    }
    return {
        "experiment": EXPERIMENT,
        "frameworks": [
            {
                "name": name, "installed": defects.installed(name), "right": sum(v),
                "cases": len(v),
            }
            for name, v in given.items()
        ],
        "defects": [
            {
                "number": defect.number, "title": defect.title, "note": defect.note,
                "cases": [_described(c, answers.get(c.number, {})) for c in defect.cases],
            }
            for defect in defects.defects()
        ],
    }  # fmt: skip


def _described(case: Case, answers: dict[str, dict]) -> dict[str, Any]:
    names = ("number", "title", "measured", "true", "tolerance", "or_refused", "ours")
    described = {name: getattr(case, name) for name in names}
    default = defects.by_default(case)
    return described | {
        "by_default": default and default._asdict(), "answers": answers
    }  # fmt: skip


if __name__ == "__main__":
    flags.main(Config, "experiments.correctness")
