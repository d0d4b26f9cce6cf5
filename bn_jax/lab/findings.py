"""What an experiment concludes, and a number of its source beside the one measured here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bn_jax.lab.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the table "Beside the published numbers".

    Attributes:
      quantity: what was measured.
      here: what this run found, as text.
      source: what the source says; None where it says nothing.
      agrees: whether ours agrees; None where that is not judged.
      reason: why it may not agree.
      claim: False for a setting, of which there is nothing to judge.
    """

    quantity: str
    here: str
    source: str | None = None
    agrees: bool | None = None
    reason: str | None = None
    claim: bool = True

    def to_json(self) -> dict[str, Any]:
        """The row as `summary.json` has it: a setting has no key `agrees`."""
        row: dict[str, Any] = {
            "quantity": self.quantity, "here": self.here, "source": self.source
        }  # fmt: skip
        if self.claim:
            row["agrees"] = self.agrees
        return row | ({"reason": self.reason} if self.reason else {})

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Published:
        """The inverse of `to_json`."""
        return cls(**row, claim="agrees" in row)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What an experiment concludes from what was trained.

    Attributes:
      summary: further entries of `summary.json`.
      tables: of the experiment's own.
      published: the source's numbers beside ours.
      figures: (name of the file, caption, figure).
    """

    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tables: Sequence[Table] = ()
    published: Sequence[Published] | None = None
    figures: Sequence[tuple[str, str, Figure]] = ()

    def to_json(self) -> dict[str, Any]:
        """The entries of `summary.json`, `published` among them where there are such rows."""
        found = dict(self.summary)
        if self.tables:
            found["tables"] = [table.to_json() for table in self.tables]
        if self.published is not None:
            found["published"] = [row.to_json() for row in self.published]
        return found
