"""Commands of the experiments, each in a fork of one process: see `forked.py`."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

COMPARE = """
from bn_jax.lab import flags
from experiments import compare
flags.main(compare.Config, compare.run)
"""
# Tiny runs, one after the other so that records appear one by one. All of one shape, for
# what is compiled for one test is there for the next.
TINY = (
    "--features=8", "--steps=20", "--eval_every=10", "--seeds=2", "--learning_rates=0.1,1",
    "--max_runs_at_once=1",
)  # fmt: skip
PROGRESS = re.compile(r"\w+: \d+ runs(, step [^:]*)?(: \d+% of all done, about \d+ s left)?")


class Finished(NamedTuple):
    """How a program ended, and what it wrote."""

    code: int
    out: str
    err: str

    def error(self, code=2):
        """What follows "error: " in the one line beside those of progress."""
        lines = [line for line in self.err.splitlines() if not PROGRESS.fullmatch(line)]
        assert (self.code, len(lines)) == (code, 1), self
        assert lines[0].startswith("error: "), self
        return lines[0].removeprefix("error: ")


class Server:
    """The process that forks."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, cwd=folder, env=environment,
        )  # fmt: skip

    def start(self, *argv, before="", code=COMPARE):
        """Runs `before` and `code` with these arguments; the number of the process."""
        for file in ("stdout", "stderr"):
            (self._folder / file).write_text("")
        job = {"argv": ["program", *argv], "code": before + code, "folder": str(self._folder)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> Finished:
        code = int(self._process.stdout.readline())
        return Finished(code, *((self._folder / f).read_text() for f in ("stdout", "stderr")))

    def run(self, *argv, **options) -> Finished:
        self.start(*argv, **options)
        return self.wait()

    def stop(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
