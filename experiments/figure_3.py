"""Ioffe & Szegedy 2015, figure 3: Inception with and without BatchNorm, beside a run here."""

from __future__ import annotations

from collections.abc import Iterator

from bn_jax.report.text import in_line, number, percent, whole

# Figure 3: millions of steps to 72.2 %, and the maximum accuracy in per cent.
PUBLISHED = {
    "inception": (31.0, 72.2),
    "bn_baseline": (13.3, 72.7),
    "bn_x5": (2.1, 73.0),
    "bn_x30": (2.7, 74.8),
    "bn_x5_sigmoid": (None, 69.8),
}
# Section 4.2.2.
FAILED = {"inception_x5": "diverged", "inception_sigmoid": "at chance"}


def rows(summary: dict, chance: float) -> Iterator[dict]:
    """Steps to the baseline's best and highest accuracy of every arm, and ratios of steps.

    `agrees` compares directions, as the sizes are others: whether an arm's highest accuracy is
    on the same side of Inception's, and whether it takes fewer steps than Inception.
    """
    base = summary["arms"][0]
    comparable = base["arm"] == "inception"
    goal = f"{percent(summary['target']['value'])} %"
    for arm in summary["arms"]:
        name = arm["arm"]
        steps = in_line(arm["steps_to_target"], whole, arm["seeds"])
        best = in_line(arm["max_accuracy"], percent, arm["seeds"])
        yield {
            "quantity": f"{name}: steps to {goal}, maximum accuracy (%)",
            "here": f"{steps}, {best}",
            "source": _source(name),
            "agrees": _agrees(arm, base, chance) if comparable else None,
        }
    for faster in summary["speedup"] if comparable else ():
        name = faster["arm"]
        millions, _ = PUBLISHED.get(name, (None, None))
        if millions:
            ratio = {"median": faster["steps"]["ratio"], "ci95": faster["steps"]["ci95"]}
            yield {
                "quantity": f"steps of inception over those of {name} (agrees: above 1)",
                "here": in_line(ratio, number, base["seeds"]),
                "source": number(PUBLISHED["inception"][0] / millions),
                "agrees": (ratio["median"] or 0) > 1,
            }


def _source(name):
    if name in FAILED:
        return FAILED[name]
    if name not in PUBLISHED:
        return None
    millions, best = PUBLISHED[name]
    return f"{f'{millions:.1f}M' if millions else 'not reached'}, {best:.1f}"


def _agrees(arm, base, chance):
    name, best = arm["arm"], arm["max_accuracy"]["median"]
    if name == "inception_x5":
        return 2 * arm["diverged"] >= arm["seeds"]
    if name == "inception_sigmoid":
        return best < 2 * chance
    if name == base["arm"] or name not in PUBLISHED:
        return None
    above = PUBLISHED[name][1] > PUBLISHED[base["arm"]][1]
    return above == (best > base["max_accuracy"]["median"])
