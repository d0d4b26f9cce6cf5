"""Runs programs one after the other, each in a fork of a process that has imported it all.

Importing takes seconds, a fork milliseconds. Each line of standard input is a job in JSON:
`code` to run as `__main__`, `argv`, the `folder` for its output; the answers are two lines,
the number of the process and, when it has ended, its exit code.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

LIMIT = 200  # seconds, for a program that hangs

for module in (
    "bn_jax.lab.comparison", "bn_jax.lab.data", "bn_jax.lab.sweeps", "bn_jax.lab.statistics",
    "bn_jax.lab.models", "bn_jax.lab.report",
    "bn_jax.lab.training.distributed", "bn_jax.lab.resumable", "flax.serialization",
    "orbax.checkpoint", "rich.table", "sklearn.datasets", "sklearn.model_selection",
    "tensorflow_datasets",
):  # fmt: skip
    importlib.import_module(module)


def next_job():
    """Forks for every job; comes back only in the forks."""
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            _, status = os.waitpid(pid, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        else:
            return json.loads(line)
    sys.exit()


def run(job):
    """The exit code of the job."""
    sys.argv = job["argv"]
    try:
        exec(job["code"], {"__name__": "__main__"})
    except SystemExit as e:
        return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


job = next_job()
signal.alarm(LIMIT)
for descriptor, name in ((1, "stdout"), (2, "stderr")):
    file = os.open(Path(job["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
code = run(job)
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # Taking all those modules down would take a second.
