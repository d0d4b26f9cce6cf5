"""Checks what `python -m experiments.compare` left in the folder named on the command line."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
summary = json.loads((folder / "summary.json").read_text())
config = json.loads((folder / "config.json").read_text())
records = (folder / "records.jsonl").read_text().splitlines()
flags = config["flags"]

runs = len(flags["arms"]) * len(flags["learning_rates"]) * flags["seeds"]
assert len(records) == runs, (len(records), runs)
assert [a["arm"] for a in summary["arms"]] == ["none", "bn"]
assert all(a["max_accuracy"]["median"] > 0.9 for a in summary["arms"]), summary["arms"]
(speedup,) = summary["speedup"]
# Between 3 and 6 in the runs of the README; below 1.5 something is broken.
assert speedup["steps"]["ratio"] > 1.5, speedup
for name in ("report.html", "figures/learning_curves.png", "figures/steps_to_target.png"):
    assert (folder / name).stat().st_size > 10_000, name
print(f"{folder}: {runs} runs, bn in {speedup['steps']['ratio']:.2f} times fewer steps")
