"""Why a published number was not found again, as far as that is known.

Written after looking at the runs, so it is no part of a run: `experiments.make_report` puts a
reason beside a number that does not agree, and where a later run agrees it does not appear.
"""

from __future__ import annotations

# By experiment, the reason for quantities that begin with these words.
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


def reason(experiment: str, quantity: str) -> str | None:
    """The one for a quantity of an experiment; None where there is none."""
    known = REASONS.get(experiment, {})
    return next((text for start, text in known.items() if quantity.startswith(start)), None)
