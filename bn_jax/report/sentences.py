"""The comparison of two arms as a plain sentence that claims no more than was measured."""

from __future__ import annotations

import math

from bn_jax.report.points import grid, label, same_point, values
from bn_jax.report.text import finite, number, whole

FEWER_MORE = {"steps": ("fewer steps", "more steps"), "seconds": ("less time", "more time")}
EQUAL = {"steps": "as many steps", "seconds": "as much time"}


def speedup_lines(summary: dict) -> list[str]:
    """One sentence per arm and its baseline: at their own best rates, then at the same rate.

    Between them, where the best rate of an arm is at an end of the grid, one that says so.
    "2.9 times fewer steps" is the ratio of the medians over seeds. A ratio below 1 is told
    as its inverse, "more steps"; an interval with 1 in it is said to allow for chance.
    """
    budget = summary["budget_steps"]
    own = _speedups(summary, budget)
    lines = [f"Each arm at its own best learning rate: {line}" for line in own]
    lines += _at_an_end(summary)
    same = summary.get("at_same_learning_rate")
    if same:
        where = label(summary, same)
        lines += [f"All arms at learning {where}: {s}" for s in _speedups(same, budget)]
    return lines or [nothing_to_compare(summary)]


def comparisons(block: dict, budget: int) -> list[str]:
    """A sentence per speedup of `block`, which has "arms" and "speedup"; and one on its grid.

    The last is there where the best learning rate of an arm is at an end of those tried.
    """
    return _speedups(block, budget) + _at_an_end(block)


def _speedups(block, budget):
    arms = {arm["arm"]: arm for arm in block["arms"]}
    return [
        _sentence(s, arms[s["arm"]], arms[s["over"]], budget) for s in block.get("speedup", [])
    ]


def nothing_to_compare(summary: dict) -> str:
    """The sentence for a summary without a speedup."""
    names = ", ".join(arm["arm"] for arm in summary["arms"])
    return f"Nothing to compare: the only runs are of {names or 'no arm at all'}."


def _at_an_end(block):
    """ "bn's best learning rate, 3, is the largest that was tried." in a list, or nothing."""
    found = []
    for arm in block["arms"] if block.get("speedup") else ():
        rates = values([p for p in grid(block) if p["arm"] == arm["arm"]], "learning_rate")
        for rate, end in ((rates[0], "smallest"), (rates[-1], "largest")):
            if len(rates) > 1 and same_point(arm, {"learning_rate": rate}, ("learning_rate",)):
                found.append((arm["arm"], number(rate), end))
    first = "{}'s best learning rate, {}, is the {} that was tried"
    texts = [("{}'s, {}, the {}" if i else first).format(*end) for i, end in enumerate(found)]
    return ["; ".join(texts) + "."] if found else []


def _sentence(speedup: dict, arm: dict, base: dict, budget: int) -> str:
    steps, seconds = speedup["steps"], speedup.get("seconds") or {}
    if not _amount(steps, "steps"):
        return _without_ratio(arm, base, budget)
    single = min(arm["seeds"], base["seeds"]) == 1
    text = f"{arm['arm']} reaches the target in {_amount(steps, 'steps')}"
    text += f" {'as' if _equal(steps) else 'than'} {base['arm']}"
    text += " (one seed: no interval)" if single else _interval(steps, "95 % interval ")
    if _amount(seconds, "seconds"):
        contrast = "but " if _faster(steps) != _faster(seconds) else ""
        text += f"; {contrast}{_amount(seconds, 'seconds')}"
        text += "" if single else _interval(seconds)
    if _ratio(steps) is None:
        text += f"; the median run with {base['arm']} does not reach it within "
        text += f"{whole(budget)} steps ({_count(base)} runs do)"
    return text + "."


def _amount(part: dict, unit: str) -> str:
    """ "2.9 times fewer steps"; "" where there is nothing to tell."""
    ratio, bound = _ratio(part), finite(part.get("at_least"))
    fewer, more = FEWER_MORE[unit]
    if ratio is None:
        return f"more than {number(bound)} times {fewer}" if bound else ""
    if _equal(part):
        return EQUAL[unit]
    return f"{number(max(ratio, 1 / ratio))} times {fewer if ratio > 1 else more}"


def _interval(part: dict, name: str = "") -> str:
    """ " [2.4 to 3.3]", inverted where the ratio is told as its inverse."""
    if part.get("ci95") is None:
        return ""
    # A ratio of 0 is as open as one of infinity: one of the arms does not reach.
    low, high = (finite(end) or None for end in part["ci95"])
    chance = (low or 0) <= 1 <= (high or math.inf) and not _equal(part)
    if not _faster(part):
        low, high = high and 1 / high, low and 1 / low
    if low is None:
        text = "open at both ends" if high is None else f"{number(high)} or less"
    else:
        text = f"{number(low)} " + ("or more" if high is None else f"to {number(high)}")
    return f" [{name}{text}{', may be chance' if chance else ''}]"


def _ratio(part: dict) -> float | None:
    ratio = finite(part.get("ratio"))
    return ratio if ratio is not None and ratio > 0 else None


def _equal(part: dict) -> bool:
    ratio = _ratio(part)
    return ratio is not None and number(ratio) == "1"


def _faster(part: dict) -> bool:
    ratio = _ratio(part)
    return ratio is None or ratio >= 1 or _equal(part)


def _without_ratio(arm: dict, base: dict, budget: int) -> str:
    """For arms of which half of the runs or more do not reach, or do so at step 0."""
    within = f"reach the target within {whole(budget)} steps"
    ours, theirs = (finite(a["steps_to_target"]["median"]) for a in (arm, base))
    if ours is None and theirs is None:
        return (
            f"the median run does not {within}, with {arm['arm']} ({_count(arm)} runs do) "
            f"or with {base['arm']} ({_count(base)})."
        )
    if ours is None:
        return (
            f"the median run with {arm['arm']} does not {within} ({_count(arm)} runs do); "
            f"that with {base['arm']} does ({_count(base)})."
        )
    after = "never" if theirs is None else f"after {whole(theirs)}"
    return (
        f"the median run with {arm['arm']} reaches the target after {whole(ours)} steps, "
        f"that with {base['arm']} {after}."
    )


def _count(arm: dict) -> str:
    return f"{arm['reached']} of {arm['seeds']}"
