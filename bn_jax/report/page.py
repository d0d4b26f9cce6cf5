"""One HTML page per experiment: the question, the answer, and all that it rests on."""

from __future__ import annotations

from pathlib import Path

from bn_jax.report.markup import (
    block,
    code,
    definitions,
    document,
    figure,
    heading,
    paragraph,
    section,
    table,
)
from bn_jax.report.points import all_rates, label
from bn_jax.report.sentences import comparisons, nothing_to_compare
from bn_jax.report.tables import published_rows, same_rate_rows, summary_rows
from bn_jax.report.text import number, plural, subject, target_text, whole


def html_page(
    summary: dict, config: dict, figures: list[tuple[str, Path]], question: str
) -> str:
    """The report as one file: figures embedded, no script, nothing loaded from elsewhere.

    Args:
      summary: of summary.json.
      config: of config.json; whatever it has is shown.
      figures: captions and PNG files, from `captions` and `save_all`.
      question: the title.
    """
    parts = [
        heading(question),
        _answer(summary),
        paragraph(_protocol(summary)),
        section("Each arm at its own best learning rate", _best_table(summary)),
        *_published(summary),
        section("Figures", *(figure(caption, path) for caption, path in figures)),
        _same_rate(summary),
        section("What the numbers mean", definitions(_meanings(summary, config))),
        section("Settings", definitions(config.get("flags") or {})),
        section("Environment", definitions(_environment(config))),
        section("The command that repeats it", code(config.get("command") or "")),
    ]
    return document(question, parts)


def _published(summary: dict) -> list[str]:
    header, rows = published_rows(summary)
    title = "Beside the published numbers"
    return [section(title, table(title, header, rows))] if rows else []


def _answer(summary: dict) -> str:
    lines = comparisons(summary, summary["budget_steps"])
    if not lines:
        return block("answer", paragraph(nothing_to_compare(summary)))
    introduction = paragraph("With each arm at its own best learning rate:", "note")
    return block("answer", introduction, *map(paragraph, lines))


def _protocol(summary: dict) -> str:
    """What was run, in two sentences."""
    rates = all_rates(summary)
    seeds = max(arm["seeds"] for arm in summary["arms"])
    grid = f"learning rate {number(rates[0])}"
    if len(rates) > 1:
        ends = f"{number(rates[0])} to {number(rates[-1])}"
        grid = f"each of {len(rates)} learning rates ({ends})"
    return (
        f"Measured on {subject(summary)} with {plural(seeds, 'seed')} at {grid}, for at most "
        f"{whole(summary['budget_steps'])} steps a run. The target is {target_text(summary)}."
    )


def _best_table(summary: dict) -> str:
    caption = (
        "Median over seeds with the 95 % interval below it. The best learning rate of an "
        "arm is chosen on the validation set."
    )
    return table(caption, *summary_rows(summary))


def _same_rate(summary: dict) -> str:
    """The section on the baseline's best rate for all arms; "" where it was not measured."""
    rows = same_rate_rows(summary)
    if rows is None:
        return ""
    same = summary["at_same_learning_rate"]
    caption = f"All arms at {label(summary, same)}, the baseline's best."
    lines = comparisons(same, summary["budget_steps"])
    return section(
        "All arms at the same learning rate", *map(paragraph, lines), table(caption, *rows)
    )


def _meanings(summary: dict, config: dict) -> dict[str, str]:
    every = (config.get("flags") or {}).get("eval_every")
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
    if "baseline" in summary["target"]["chosen"]:
        meanings["target"] = (
            "The best of the baseline: at the learning rate at which it is most accurate on "
            "the validation set, the median over seeds of each run's best test accuracy."
        )
    return meanings


def _environment(config: dict) -> dict:
    """All of the config that is not shown elsewhere."""
    names = {"seconds": "seconds spent", "git_commit": "git commit"}
    return {
        names.get(key, key): value
        for key, value in config.items()
        if key not in ("flags", "command")
    }
