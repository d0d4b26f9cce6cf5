"""What ails the BatchNorms of a checkpointed model: a table, worst first.

The inputs should be a batch as training has it. `--json` prints the findings for programs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bn_jax.errors import UserError
from experiments import checkpoint, flags
from experiments.flags import flag


@dataclasses.dataclass(frozen=True)
class Config(checkpoint.Config):
    """Every flag of the tool; see `python -m experiments.diagnose --help`."""

    json: bool = flag(False, "print JSON")


def run(config: Config) -> list[Any]:
    """Prints the findings, and returns them."""
    from flax.errors import FlaxError

    from bn_jax.report.findings import print_findings
    from bn_jax.surgery import diagnose, findings_to_json

    model, variables, inputs = checkpoint.load(config)
    calls = {
        name: checkpoint.keywords(name, getattr(config, name)) for name in ("train", "evaluate")
    }
    try:
        findings = diagnose(model, variables, inputs, **calls)
    except (FlaxError, TypeError, ValueError) as e:
        raise UserError(str(e)) from e
    if config.json:
        print(findings_to_json(findings))
    else:
        print_findings(findings)
    return findings


if __name__ == "__main__":
    flags.main(Config, run)
