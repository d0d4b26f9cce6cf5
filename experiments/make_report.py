"""Writes docs/results.md: what the experiments found, beside what their sources published.

Takes the newest finished run of every experiment, on each dataset and model, below `--runs`;
or those of `--workdirs`. What the page has of others stays: what ran on a GPU can stand beside
what ran on a processor.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import Flags, flag

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    from bn_jax.lab import lock, workdir
    from bn_jax.lab.report import read_json, remove_unfinished, write_atomically
    from bn_jax.lab.report.text import subject
    from experiments.make_report_page import Finished, page

ORDER = (
    "circles", "mnist_sigmoid", "cifar_cnn", "cifar_speedrun", "first_layer", "lstm",
    "inception", "learning_rates", "regularisation", "batch_size", "compare",
)  # fmt: skip
# Why a published number was not found again, as far as that is known. Written after looking at
# the runs; where a later run agrees it does not appear. By experiment, for quantities that
# begin with these words.
REASONS: dict[str, dict[str, str]] = {
    "cifar_speedrun": {
        "bn: test accuracy": (
            "The images here had been encoded anew as JPEG. The recipe written in torch, after "
            "the source's code, ended as far below the published accuracy on them."
        ),
    },
    "inception": {
        "bn_x5_sigmoid: steps to": (
            "In a run as short as this Inception is far from its best, and the sigmoids pass "
            "it; the paper compares after tens of millions of steps."
        ),
    },
    "regularisation": {
        "gap with BatchNorm less that without": (
            "The interval over the seeds reaches 0 or goes beyond, so a smaller gap is not "
            "shown; the paper does not say how much smaller it is."
        ),
    },
    "batch_size": {
        "accuracy of renorm less that of bn": (
            "On this set, which is easy, batches of 4 do not harm BatchNorm's running "
            "statistics enough to cost accuracy, so there is nothing to win back; at batches "
            "of 2 they do, and renormalisation is far better (first figure)."
        ),
    },
}


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Every flag; see `python -m experiments.make_report --help`."""

    runs: str = flag("runs", "folder with <experiment>/<run>, as the experiments leave them")
    workdirs: tuple[str, ...] = flag((), "folders of runs, instead of the newest below --runs")
    out: str = flag("docs/results.md", "the page; its figures go to figures/results beside it")


def run(config: Config) -> None:
    """Writes the page and its figures, and prints where to."""
    runs, out = (Path(path).expanduser() for path in (config.runs, config.out))
    folders = [Path(folder).expanduser() for folder in config.workdirs] or newest(runs)
    finished = [read(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    link = "figures/results"
    figures = out.parent / link
    with lock.held(out.with_name(f".{out.name}.lock"), f"--out={out}"):
        for folder in (out.parent, figures):
            remove_unfinished(folder)
        before = _page(out) if out.exists() else ""
        write_atomically(out, page(finished, figures, link, ORDER, before))
    print(out)


def _page(out):
    try:
        return out.read_text()
    except UnicodeDecodeError as e:
        raise UserError(f"--out={out} is no page of ours, it is not UTF-8: {e}") from e


def newest(runs: Path) -> list[Path]:
    """The newest finished run of every experiment and subject."""
    found: dict[tuple[str, ...], Path] = {}
    for name in ORDER:
        whole = [f for f in (runs / name).glob("*") if workdir.missing(f) is None]
        for folder in sorted(whole, key=lambda f: (f / "summary.json").stat().st_mtime):
            summary = read(folder).summary
            found[name, subject(summary)] = folder
    if not found:
        raise UserError(f"--runs={runs}: no finished run of {', '.join(ORDER)}")
    return list(found.values())


def read(folder: Path) -> Finished:
    """What is in the folder of a run, as `experiments.make_report_page` takes it.

    Raises:
      UserError: a file is missing, is damaged, or lacks what the page shows.
    """
    if path := workdir.missing(folder):
        raise UserError(f"{folder} is not the folder of a finished run: there is no {path}")
    summary, settings = (read_json(folder / name) for name in ("summary.json", "config.json"))
    for name, found, wanted in (
        ("summary.json", summary, ("experiment", "question", "dataset", "model")),
        ("config.json", settings, ("command", "flags")),
    ):
        if lacking := [key for key in wanted if key not in found]:
            raise UserError(f"{folder / name} has no {lacking[0]!r}: it is of another program")
    for row in summary.get("published", ()):
        row["reason"] = row.get("reason") or reason(summary["experiment"], row["quantity"])
    captions = folder / "figures" / "captions.json"
    figures = read_json(captions) if captions.exists() else {}
    return Finished(summary, settings, figures, folder)


def reason(experiment: str, quantity: str) -> str | None:
    """The one for a quantity of an experiment; None where there is none."""
    known = REASONS.get(experiment, {})
    return next((text for start, text in known.items() if quantity.startswith(start)), None)


if __name__ == "__main__":
    flags.main(Config, "experiments.make_report")
