"""What ails the BatchNorms of a checkpointed model: a table, worst first.

The inputs should be a batch as training has it. `--json` prints the findings for programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.tools import checkpoint

if TYPE_CHECKING:
    from rich.console import Console

    from bn_jax.surgery.diagnose import Finding


@dataclasses.dataclass(frozen=True)
class Config(checkpoint.Config):
    """Every flag of the tool; see `python -m bn_jax.lab.tools.diagnose --help`."""

    json: bool = flag(False, "print JSON")


def run(config: Config) -> list[Finding]:
    """Prints the findings, and returns them."""
    from flax.errors import FlaxError

    from bn_jax.surgery import diagnose, findings_to_json

    model, variables, inputs = checkpoint.load(config)
    train, evaluate = (
        checkpoint.keywords(name, getattr(config, name)) for name in ("train", "evaluate")
    )
    try:
        findings = diagnose(model, variables, inputs, train=train, evaluate=evaluate)
    except (FlaxError, TypeError, ValueError) as e:
        raise UserError(str(e)) from e
    if config.json:
        print(findings_to_json(findings))
    else:
        print_findings(findings)
    return findings


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """A row for each finding, in their order, on `console` or standard output.

    Args:
      findings: what `diagnose` returns.
      console: where to; 80 columns will do, cells that are wider are folded.
    """
    from rich.box import ASCII2
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    # ASCII, as a log file may be read, or written, in any encoding.
    table = Table(box=ASCII2, show_lines=True)
    for title in ("finding, layer", "figure", "limit", "what it is, and what to do"):
        right = title in ("figure", "limit")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for f in findings:
        layer = "/".join(map(str, f.path)) or "the model itself"
        cells = (f"{f.kind}\n{layer}", f"{f.figure:.3g}", f"{f.threshold:.3g}")
        table.add_row(*map(Text, (*cells, f"{f.meaning}\n-> {f.remedy}")))
    console.print(table if findings else "Nothing found.")


if __name__ == "__main__":
    flags.main(Config, run)
