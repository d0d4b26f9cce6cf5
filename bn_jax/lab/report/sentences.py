"""The comparison of two arms as a plain sentence that claims no more than was measured."""

from __future__ import annotations

import math

from bn_jax.lab.report.comparison import Outcome
from bn_jax.lab.report.text import number, whole
from bn_jax.lab.statistics import ArmResult
from bn_jax.lab.statistics.convergence import Ratio
from bn_jax.lab.statistics.summary import Speedup

STEPS = ("fewer steps", "more steps", "as many steps")
SECONDS = ("less time", "more time", "as much time")


def speedup_lines(comparison: Outcome) -> list[str]:
    """One sentence per arm and its baseline: at their own best rates, then at the same rate.

    Between them, where the best rate of an arm is at an end of the grid, one that says so.
    "2.9 times fewer steps" is the ratio of the medians over seeds. A ratio below 1 is told
    as its inverse, "more steps"; an interval with 1 in it is said to allow for chance.
    """
    own = "Each arm at its own best learning rate: "
    lines = [own + _sentence(s, comparison.budget) for s in comparison.speedups]
    lines += _at_an_end(comparison)
    if same := comparison.same:
        where = f"All arms at learning {comparison.same_label}: "
        lines += [where + _sentence(s, same.budget) for s in same.speedups]
    return lines or answer(comparison)


def answer(comparison: Outcome) -> list[str]:
    """The sentences on the arms at their best points; one where there is no second arm."""
    lines = [_sentence(s, comparison.budget) for s in comparison.speedups]
    names = ", ".join(arm.arm for arm in comparison.arms) or "no arm at all"
    nothing = [f"Nothing to compare: the only runs are of {names}."]
    return lines + _at_an_end(comparison) or nothing


def _at_an_end(comparison: Outcome) -> list[str]:
    """ "bn's best learning rate, 3, is the largest that was tried." in a list, or nothing."""
    found = []
    for arm in comparison.arms if comparison.speedups else ():
        rates = sorted({p.learning_rate for p in comparison.points if p.arm == arm.arm})
        for rate, end in ((rates[0], "smallest"), (rates[-1], "largest")):
            if len(rates) > 1 and arm.learning_rate == rate:
                found.append((arm.arm, number(rate), end))
    first = "{}'s best learning rate, {}, is the {} that was tried"
    texts = [("{}'s, {}, the {}" if i else first).format(*end) for i, end in enumerate(found)]
    return ["; ".join(texts) + "."] if found else []


def _sentence(speedup: Speedup, budget: int) -> str:
    arm, base, steps, seconds = speedup
    steps, seconds = _known(steps), _known(seconds)
    if not (amount := _amount(steps, STEPS)):
        return _without_ratio(arm, base, budget)
    single = min(arm.seeds, base.seeds) == 1
    text = f"{arm.arm} reaches the target in {amount} {'as' if _equal(steps) else 'than'} "
    text += base.arm
    text += " (one seed: no interval)" if single else _interval(steps, "95 % interval ")
    if amount := _amount(seconds, SECONDS):
        contrast = "but " if _faster(steps) != _faster(seconds) else ""
        text += f"; {contrast}{amount}" + ("" if single else _interval(seconds))
    if steps.ratio is None:
        text += f"; the median run with {base.arm} does not reach it within "
        text += f"{whole(budget)} steps ({base.count} runs do)"
    return text + "."


def _known(part: Ratio) -> Ratio:
    """A ratio whose numbers of 0, which stand for infinitely many, are None."""
    low, high = (end or None for end in part.ci95)
    return Ratio(part.ratio or None, (low, high), part.at_least or None)


def _amount(part: Ratio, words: tuple[str, str, str]) -> str:
    """ "2.9 times fewer steps"; "" where there is nothing to tell."""
    fewer, more, equal = words
    if part.ratio is None:
        return f"more than {number(part.at_least)} times {fewer}" if part.at_least else ""
    if _equal(part):
        return equal
    times = number(max(part.ratio, 1 / part.ratio))
    return f"{times} times {fewer if part.ratio > 1 else more}"


def _interval(part: Ratio, name: str = "") -> str:
    """ " [2.4 to 3.3]", inverted where the ratio is told as its inverse."""
    low, high = part.ci95
    chance = (low or 0) <= 1 <= (high or math.inf) and not _equal(part)
    if not _faster(part):
        low, high = high and 1 / high, low and 1 / low
    if low is None:
        text = "open at both ends" if high is None else f"{number(high)} or less"
    else:
        text = f"{number(low)} " + ("or more" if high is None else f"to {number(high)}")
    return f" [{name}{text}{', may be chance' if chance else ''}]"


def _equal(part: Ratio) -> bool:
    return part.ratio is not None and number(part.ratio) == "1"


def _faster(part: Ratio) -> bool:
    return part.ratio is None or part.ratio >= 1 or _equal(part)


def _without_ratio(arm: ArmResult, base: ArmResult, budget: int) -> str:
    """For arms of which half of the runs or more do not reach, or do so at step 0."""
    within = f"reach the target within {whole(budget)} steps"
    ours, theirs = arm.steps_to_target.median, base.steps_to_target.median
    if ours is None and theirs is None:
        return (
            f"the median run does not {within}, with {arm.arm} ({arm.count} runs do) or with "
            f"{base.arm} ({base.count})."
        )
    if ours is None:
        return (
            f"the median run with {arm.arm} does not {within} ({arm.count} runs do); that "
            f"with {base.arm} does ({base.count})."
        )
    after = "never" if theirs is None else f"after {whole(theirs)}"
    return (
        f"the median run with {arm.arm} reaches the target after {whole(ours)} steps, that "
        f"with {base.arm} {after}."
    )
