"""Which BatchNorm gives the right answer where another does not?

Asks bn_jax and every peer that is installed (Flax linen and nnx, Haiku, Equinox, torch,
Keras) the cases of `experiments.defects`, holds each answer to the true value, and writes
the table to the terminal, to `report.html` and to `correctness.md`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bn_jax.errors import UserError
from experiments import flags, workdir
from experiments.flags import flag

EXPERIMENT = "correctness"
QUESTION = "Which BatchNorm is right where another is not?"
PACKAGES = ("jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "keras", "numpy")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every flag of the experiment; see `python -m experiments.correctness --help`."""

    markdown: str | None = flag(
        None, "file for the report in Markdown, as well as correctness.md of the workdir"
    )
    workdir: str | None = flag(
        None, "folder for the results; by default runs/correctness/<time>"
    )
    overwrite: bool = flag(False, "delete the run that is in the workdir")

    def __post_init__(self):
        if self.markdown and not Path(self.markdown).parent.is_dir():
            raise UserError(f"--markdown={self.markdown}: there is no such folder")


def run(config: Config) -> dict[str, Any]:
    """Measures, fills the workdir, prints the table; what `summary.json` holds comes back."""
    import json

    import jax
    from rich.console import Console

    from bn_jax import report
    from bn_jax.report import correctness as pages

    folder = workdir.create(config.workdir, EXPERIMENT, config.overwrite)
    devices = [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    settings = workdir.write_config(
        folder, config, EXPERIMENT, devices, versions=workdir.versions(PACKAGES)
    )
    summary = summarize(ask(folder / "records.jsonl"))
    text = json.dumps(summary, indent=2, allow_nan=False)
    report.write_atomically(folder / "summary.json", text + "\n")
    markdown = pages.markdown_page(summary, settings, QUESTION)
    for path in (folder / "correctness.md", config.markdown):
        if path is not None:
            report.write_atomically(path, markdown)
    report.write_atomically(
        folder / "report.html", pages.html_page(summary, settings, QUESTION)
    )
    Console(highlight=False).print(report.terminal_table(*pages.table(summary)))
    print(folder / "report.html")
    return summary


def ask(path: Path) -> list[dict]:
    """Every framework's answers; each is in the file at `path` as soon as it is there."""
    from bn_jax import report
    from experiments.defects import FRAMEWORKS, answer, defects
    from experiments.progress import Progress

    cases = [case for defect in defects() for case in defect.cases]
    records = []
    with Progress(len(cases) * len(FRAMEWORKS)) as progress, report.open_records(path) as file:
        for framework in FRAMEWORKS:
            progress.describe(framework)
            for case in cases:
                given = answer(case, framework)
                if given is not None:
                    about = {"case": case.number, "framework": framework}
                    records.append(about | given._asdict())
                    report.append_record(file, records[-1])
                progress.advance(1)
    return records


def summarize(records: list[dict]) -> dict[str, Any]:
    """The cases with everybody's answers, and how many of them each framework gets right."""
    from experiments.defects import FRAMEWORKS, defects, installed

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
            {"name": name, "installed": installed(name), "right": sum(v), "cases": len(v)}
            for name, v in given.items()
        ],
        "defects": [
            {
                "number": defect.number, "title": defect.title, "note": defect.note,
                "cases": [_described(c, answers.get(c.number, {})) for c in defect.cases],
            }
            for defect in defects()
        ],
    }  # fmt: skip


def _described(case, answers):
    from experiments.defects import by_default

    names = ("number", "title", "measured", "true", "tolerance", "or_refused", "ours")
    described = {name: getattr(case, name) for name in names}
    default = by_default(case)
    return described | {
        "by_default": default and default._asdict(), "answers": answers
    }  # fmt: skip


if __name__ == "__main__":
    flags.main(Config, run)
