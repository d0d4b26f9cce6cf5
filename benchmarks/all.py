"""Writes docs/performance.md: what is measured, one after another, in processes of their own.

A section of the page is a program's docstring, the command, and what the command printed. With
`--only` these sections alone are written anew, and the others stay: so what ran on a GPU stands
beside what ran on a processor.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.report import write_atomically
from bn_jax.lab.report.markdown import sections

# By the order of the page; with the arguments that are not their defaults.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "layer": (),
    "cnn_step": (),
    "mlp_steps": (),
    "sweep": (),
    "start": (),
    "fold": (),
    "accumulate": ("--rounds=3",),
    "passes": (),
    "tricks": (),
    "gpu": (),
}
# That want a GPU, or packages for one and for a TPU.
ELSEWHERE = ("gpu", "passes")
INTRODUCTION = """\
# Performance

What the programs of `benchmarks/` printed, each beside what others do in the same minutes:
ratios tell more than milliseconds, as a machine that is shared has slow minutes.
`python -m benchmarks.all` runs all that any machine can, with the packages of
`requirements-dev.txt`. The others are asked for with `--only`: `passes`, which wants JAX's
packages for a GPU and a TPU, and `gpu`, which wants a GPU. `network`, which measures nothing,
is in [scaling.md](scaling.md).
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.all --help`."""

    only: tuple[str, ...] = flag(
        (), f"programs to run; by default all but {', '.join(ELSEWHERE)}"
    )
    out: str = flag("docs/performance.md", "the page")

    def __post_init__(self):
        for name in self.only:
            if name not in PROGRAMS:
                raise UserError(f"--only={name}: choose from {', '.join(PROGRAMS)}")


def run(config: Config) -> None:
    """Runs the programs and writes the page after each: what is finished is not lost."""
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    found = sections(out.read_text() if out.exists() else "")
    for name in config.only or [n for n in PROGRAMS if n not in ELSEWHERE]:
        print(name, flush=True)
        found[name] = section(name)
        chosen = [f"## {name}\n{found[name].rstrip()}\n" for name in PROGRAMS if name in found]
        write_atomically(out, "\n".join([INTRODUCTION, *chosen]))


def section(name: str) -> str:
    """A program's docstring, its command, and what this prints.

    Raises:
      UserError: it ended with an error.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = ["-m", f"benchmarks.{name}", *PROGRAMS[name]]
    done = subprocess.run(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise UserError(f"benchmarks.{name} ended with exit status {done.returncode}")
    about = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text()))
    line = " ".join(["python", *command])
    return f"{about}\n\n```\n{line}\n```\n{done.stdout.strip()}\n"


if __name__ == "__main__":
    flags.main(Config, run)
