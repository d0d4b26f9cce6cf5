"""Writes docs/results.md: what the experiments found, beside what their sources published.

Takes the newest finished run of every experiment, on each dataset and model, below `--runs`;
or those of `--workdirs`. What the page has of others stays: what ran on a GPU can stand beside
what ran on a processor.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bn_jax.errors import UserError
from experiments import flags
from experiments.flags import flag
from experiments.reasons import reason

ORDER = (
    "circles", "mnist_sigmoid", "cifar_cnn", "cifar_speedrun", "first_layer", "lstm",
    "inception", "learning_rates", "regularisation", "batch_size", "compare",
)  # fmt: skip
WHOLE = ("config.json", "summary.json", "report.html")  # of a run that came to its end


@dataclasses.dataclass(frozen=True)
class Config:
    """Every flag; see `python -m experiments.make_report --help`."""

    runs: str = flag("runs", "folder with <experiment>/<run>, as the experiments leave them")
    workdirs: tuple[str, ...] = flag((), "folders of runs, instead of the newest below --runs")
    out: str = flag("docs/results.md", "the page; its figures go to figures/results beside it")


def run(config: Config) -> None:
    """Writes the page and its figures, and prints where to."""
    from bn_jax.report import write_atomically
    from bn_jax.report.results import page

    finished = [read(Path(folder)) for folder in config.workdirs or newest(Path(config.runs))]
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    link = "figures/results"
    before = out.read_text() if out.exists() else ""
    write_atomically(out, page(finished, out.parent / link, link, ORDER, before))
    print(out)


def newest(runs: Path) -> list[Path]:
    """The newest finished run of every experiment and subject."""
    from bn_jax.report.text import subject

    found: dict[tuple[str, ...], Path] = {}
    for name in ORDER:
        whole = [f for f in (runs / name).glob("*") if all((f / w).exists() for w in WHOLE)]
        for folder in sorted(whole, key=lambda f: (f / "summary.json").stat().st_mtime):
            summary = read(folder).summary
            found[name, subject(summary)] = folder
    if not found:
        raise UserError(f"--runs={runs}: no finished run of {', '.join(ORDER)}")
    return list(found.values())


def read(folder: Path) -> Any:
    """What is in the folder of a run, as `bn_jax.report.results` takes it."""
    from bn_jax.report.results import Finished

    try:
        summary, settings = (
            json.loads((folder / name).read_text()) for name in ("summary.json", "config.json")
        )
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} is not the folder of a finished run: {e}") from e
    for row in summary.get("published", ()):
        row["reason"] = row.get("reason") or reason(summary["experiment"], row["quantity"])
    captions = folder / "figures" / "captions.json"
    figures = json.loads(captions.read_text()) if captions.exists() else {}
    return Finished(summary, settings, figures, folder)


if __name__ == "__main__":
    flags.main(Config, run)
