"""What a check returns: where, what kind, the figure and its threshold, and what to do."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable

from bn_jax.surgery.intercept import Path, spelled

# Worst first: outputs that are wrong now; statistics that inference should not use; what
# training suffers from; what only costs.
KINDS = (
    "nonfinite",
    "replicas_disagree",
    "training_mode_in_evaluation",
    "never_updated",
    "train_evaluation_gap",
    "stale",
    "half_precision",
    "too_few_elements",
    "dead_features",
    "low_variance",
    "decayed_scale",
    "useless_bias",
)
# Of which less is worse.
_FLOORS = ("too_few_elements", "low_variance")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one layer.

    Attributes:
      kind: one of `KINDS`; stable, for programs.
      path: of the layer, in the variables.
      figure: what was measured.
      threshold: what it is held against.
      meaning: the figure in words, in one line.
      remedy: what to do, in one line.
    """

    kind: str
    path: Path
    figure: float
    threshold: float
    meaning: str
    remedy: str

    def __str__(self) -> str:
        return f"{spelled(self.path)}: {self.kind}: {self.meaning}; {self.remedy}"


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """In the order of `KINDS`; those of one kind by their figures, the worst first.

    Non-finite values spread to what comes after: of those the first in the model is first,
    as it is among equals.
    """

    def badness(f):
        worse = f.figure if f.kind in _FLOORS else -f.figure
        return KINDS.index(f.kind), 0 if f.kind == "nonfinite" else worse

    return sorted(findings, key=badness)


def findings_to_json(findings: Iterable[Finding]) -> str:
    """A JSON list of objects with the attributes of `Finding`; an infinite number is null."""

    def value(v):
        return None if isinstance(v, float) and not math.isfinite(v) else v

    records = [{k: value(v) for k, v in dataclasses.asdict(f).items()} for f in findings]
    return json.dumps(records, indent=2, allow_nan=False)
