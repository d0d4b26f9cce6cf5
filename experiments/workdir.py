"""The folder that a run of an experiment leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bn_jax.errors import UserError
from bn_jax.report import write_atomically
from experiments.config import Shared

OUTPUTS = (
    "config.json", "records.jsonl", "summary.json", "report.html", "figures", "checkpoints",
)  # fmt: skip
# Flags that say nothing of what is done.
PLACE = ("workdir", "overwrite", "resume", "checkpoint_every", "coordinator",
         "num_processes", "process_id")  # fmt: skip
# Those that may differ where a run goes on.
FREE = (
    *PLACE, "cache_dir", "data_dir", "tensorboard", "summary", "workers", "log_every",
    "max_bad_examples",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets", "scikit-learn")


def create(
    path: str | None, experiment: str, overwrite: bool, resumed: Any | None = None
) -> Path:
    """The folder, made and empty of any earlier run, but for one to go on with.

    Args:
      path: by default `runs/<experiment>/<time>`.
      experiment: its name.
      overwrite: delete what an earlier run left there.
      resumed: flags; a run with the same ones is left as it is.

    Raises:
      UserError: it holds another run and `overwrite` is False, or it is a file.
    """
    folder = Path(path).expanduser() if path else _new(Path("runs", experiment))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"workdir {folder} is a file: name a folder")
    left = [folder / name for name in OUTPUTS if (folder / name).exists()]
    if left and not overwrite and resumed is not None:
        check_same(folder, resumed, experiment)
        return folder
    if left and not overwrite:
        raise UserError(
            f"workdir {folder} holds another run: choose another, or --overwrite deletes it"
        )
    for old in left:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_same(folder: Path, config: Any, experiment: str) -> None:
    """Compares the flags with those of the run that is in the folder.

    Raises:
      UserError: naming the first that differs.
    """
    try:
        there = json.loads((folder / "config.json").read_text())
        old = {"experiment": there["experiment"]} | there["flags"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"workdir {folder} holds another run: choose another, or --overwrite deletes it"
        ) from e
    new = {"experiment": experiment} | json.loads(json.dumps(dataclasses.asdict(config)))
    for name in new:
        if name not in FREE and old.get(name) != new[name]:
            raise UserError(
                f"workdir {folder} holds another run, whose --{name} is {_text(old.get(name))} "
                f"and not {_text(new[name])}: choose another, or --overwrite deletes it"
            )


def _text(value):
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _new(parent):
    """A folder named by the time, that is not there yet."""
    now = time.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([now], (f"{now}-{i}" for i in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())


@contextlib.contextmanager
def entered(config: Any, experiment: str) -> Iterator[tuple[Path, Path]]:
    """The folder that this process fills, and that of the run, which all processes see.

    They are the same in process 0. What the others write, but for checkpoints, goes to a
    folder that is deleted, and what they print nowhere.

    Raises:
      UserError: as `create`; or there are several processes, and no workdir is named.
    """
    import jax

    from bn_jax.training import distributed

    if jax.process_count() > 1 and not config.workdir:
        raise UserError("--workdir: several processes need one that all of them see")
    resumed = config if config.resume else None
    if distributed.is_main():
        shared = create(config.workdir, experiment, config.overwrite, resumed)
    else:
        shared = Path(config.workdir).expanduser()
    if jax.process_count() == 1:
        yield shared, shared
        return
    distributed.barrier("workdir")
    with contextlib.ExitStack() as stack:
        folder = shared
        if not distributed.is_main():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield folder, shared


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of the run there, if that has ended, which is said; else None."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    print(f"{folder} has this run, finished; --overwrite repeats it")
    return json.loads(path.read_text())


def write_config(
    folder: Path, config: Any, experiment: str, devices: list[str], **more: Any
) -> dict[str, Any]:
    """Writes `config.json`: every flag, the command, versions, devices, the git commit."""
    # First those that say what is trained, last those that all experiments share.
    shared = {field.name for field in dataclasses.fields(Shared)}
    flags = dict(sorted(dataclasses.asdict(config).items(), key=lambda f: f[0] in shared))
    content = {
        "experiment": experiment,
        "command": command(config, experiment),
        "flags": flags,
        "versions": versions(PACKAGES),
        "devices": devices,
        "machine": platform.machine(),
        "git_commit": _git_commit(),
        **more,
    }
    write_atomically(folder / "config.json", json.dumps(content, indent=2) + "\n")
    return content


def command(config: Any, experiment: str) -> str:
    """The shell command that repeats the run: the flags that do not follow from others."""
    words = ["python", "-m", f"experiments.{experiment}"]
    for name, value in _needed(config).items():
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        words.append(f"--{name}={text}")
    return shlex.join(words)


def _needed(config):
    """Without defaults, and without what the config makes of other flags, as of `quick`."""
    names = [f.name for f in dataclasses.fields(config)]
    place = {n: getattr(config, n) for n in PLACE if n in names}
    quick = config.QUICK if getattr(config, "quick", False) else ()
    given = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if (getattr(config, f.name) != f.default or f.name in quick) and f.name not in place
    }
    for name in list(given):
        rest = {k: v for k, v in given.items() if k != name}
        with contextlib.suppress(UserError):  # it cannot be left out
            if type(config)(**rest, **place) == config:
                given = rest
    return given


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of Python and of the packages; None for those not installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _git_commit():
    """Of the code that runs, not of the folder that it runs in; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
