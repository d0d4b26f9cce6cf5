"""What a check returns: where, what kind, the figure and its threshold, and what to do."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable

import jax

from bn_jax.surgery.calls import Path, spelled

# Worst first: outputs that are wrong now; statistics that inference should not use; what
# training suffers from; what only costs. Each with what to do.
REMEDIES = {
    "nonfinite": "go back to a checkpoint from before; skip_nonfinite=True keeps statistics",
    "negative_variance": "recalibrate; average statistics (FedAvg) rather than step along them",
    "unknown_layer": "say how to read it by batch_norms={...}",
    "replicas_disagree": "average gradients and batch_stats over devices, or give axis_name",
    "training_mode_in_evaluation": "hand use_running_average down to it, or say how to "
    "evaluate: evaluate={...}",
    "never_updated": "keep the batch_stats that training returns, or recalibrate",
    "train_evaluation_gap": "recalibrate; if it is called on unlike inputs, give each a layer "
    "of its own",
    "stale": "recalibrate, or train for longer or with a lower momentum",
    "half_precision": "compute the layer before it in float32, or centre its input",
    "too_few_elements": "use larger batches, share over devices by axis_name, or BatchRenorm",
    "dead_features": "look at the layer before it and at the learning rate, or prune them",
    "low_variance": "lower epsilon or scale up what the layer is given",
    "decayed_scale": "keep weight decay off it by a mask: surgery.decay_mask has one",
    "useless_bias": "use_bias=False",
}
KINDS = tuple(REMEDIES)
# Less is worse.
_FLOORS = ("negative_variance", "too_few_elements", "low_variance")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one layer.

    Attributes:
      kind: one of `KINDS`; stable, for programs.
      path: of the layer, in the variables.
      figure: what was measured.
      threshold: what it is held against.
      meaning: the figure in words, in one line.
      remedy: what to do, in one line; by default that of its kind.
    """

    kind: str
    path: Path
    figure: float
    threshold: float
    meaning: str
    remedy: str = ""

    def __post_init__(self):
        object.__setattr__(self, "remedy", self.remedy or REMEDIES[self.kind])

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


def share(flags: jax.Array) -> float:
    """The share of features that have a flag."""
    return float(flags.mean())


def told(flags: jax.Array) -> str:
    """How many features have a flag, in words."""
    return f"{int(flags.sum())} of {flags.size} features"
