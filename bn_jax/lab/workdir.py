"""The folder that a run of an experiment leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
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

import jax

from bn_jax.errors import UserError
from bn_jax.lab import lock
from bn_jax.lab.config import Output, Processes, Source, Workdir
from bn_jax.lab.fields import kinds
from bn_jax.lab.report import read_json, remove_unfinished, write_atomically
from bn_jax.lab.training import distributed

OUTPUTS = (
    "config.json", "records.jsonl", "summary.json", "report.html", "figures", "checkpoints",
    "correctness.md", "tensorboard",
)  # fmt: skip
# Of a run that came to its end; the page is written last, when the figures are there.
WHOLE = ("config.json", "summary.json", "report.html")
LOCK = "lock"
# Flags that say nothing of what is done.
PLACE = (*kinds(Workdir), *kinds(Processes), "checkpoint_every")
# Those that may differ where a run goes on.
FREE = (
    *PLACE, "cache_dir", "data_dir", "tensorboard", "summary", "workers", "log_every",
    "max_bad_examples",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets", "scikit-learn")


@contextlib.contextmanager
def created(
    path: str | None, experiment: str, overwrite: bool, resumed: Any | None = None
) -> Iterator[Path]:
    """The folder, made and empty of any earlier run, but for one to go on with.

    Inside, no other process enters it.

    Args:
      path: by default `runs/<experiment>/<time>`.
      experiment: its name.
      overwrite: delete what an earlier run left there.
      resumed: flags; a run with the same ones is left as it is.

    Raises:
      UserError: it holds another run and `overwrite` is False, another process is in it, or
        it is no folder.
    """
    folder = _made(path, experiment)
    with lock.held(folder / LOCK, f"workdir {folder}"):
        left = [folder / name for name in OUTPUTS if (folder / name).exists()]
        if left and not overwrite and resumed is not None:
            check_same(folder, resumed, experiment)
        elif left and not overwrite:
            raise UserError(
                f"workdir {folder} holds another run: choose another, or --overwrite deletes it"
            )
        else:
            for old in left:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for place in (folder, folder / "figures"):
            remove_unfinished(place)
        yield folder


def _made(path: str | None, experiment: str) -> Path:
    if not path:
        return new_folder(Path("runs", experiment))
    folder = Path(path).expanduser()
    if os.path.lexists(folder) and not folder.is_dir():
        kind = "a file" if folder.exists() else "a symbolic link to nothing"
        raise UserError(f"workdir {folder} is {kind}: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"workdir {folder} cannot be made: {e.filename}: {e.strerror}") from e
    return folder


def check_same(folder: Path, config: Any, experiment: str) -> None:
    """Compares the flags with those of the run that is in the folder.

    Raises:
      UserError: naming the first that differs, or `config.json` where that is damaged.
    """
    try:
        there = read_json(folder / "config.json")
        old = {"experiment": there["experiment"]} | there["flags"]
    except UserError as e:
        raise UserError(f"workdir {folder} holds another run: {e}") from e
    except (OSError, KeyError, TypeError) as e:
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


def new_folder(parent: Path) -> Path:
    """A folder named by the time, made here: of two processes each makes its own."""
    now, number = time.strftime("%Y%m%d-%H%M%S"), 1
    while True:
        folder = parent / (now if number == 1 else f"{now}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


@contextlib.contextmanager
def entered(config: Any, experiment: str) -> Iterator[tuple[Path, Path]]:
    """The folder that this process fills, and that of the run, which all processes see.

    They are the same in process 0. What the others write, but for checkpoints, goes to a
    folder that is deleted, and what they print nowhere.

    Raises:
      UserError: as `created`; or there are several processes, and no workdir is named.
    """
    if jax.process_count() > 1 and not config.workdir:
        raise UserError("--workdir: several processes need one that all of them see")
    resumed = config if config.resume else None
    with contextlib.ExitStack() as stack:
        mine = None
        if distributed.is_main():
            there = created(config.workdir, experiment, config.overwrite, resumed)
            mine = stack.enter_context(there)
        if jax.process_count() > 1:
            distributed.barrier("workdir")
        if mine is not None:
            folder = shared = mine
        else:
            shared = Path(config.workdir).expanduser()
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield folder, shared


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of the run there, if that has ended, which is said; else None."""
    if missing(folder) is not None:
        return None
    print(f"{folder} has this run, finished; --overwrite repeats it")
    return read_json(folder / "summary.json")


def missing(folder: Path) -> Path | None:
    """A file that the run there has not left yet; None of a run that is finished."""
    figures = folder / "figures"
    captions = figures / "captions.json"
    named = read_json(captions) if captions.exists() else ()
    files = [*(folder / name for name in WHOLE), *(figures / name for name in named)]
    return next((path for path in files if not path.exists()), None)


def write_config(folder: Path, config: Any, experiment: str, **more: Any) -> dict[str, Any]:
    """Writes `config.json`: every flag, the command, versions, devices, the git commit."""
    # First those that say what is trained, last those that all experiments share.
    groups = (Source, Processes, Output, Workdir)
    shared = {name for group in groups for name in kinds(group)} - {"dataset", "train_examples"}
    flags = dict(sorted(dataclasses.asdict(config).items(), key=lambda f: f[0] in shared))
    content = {
        "experiment": experiment,
        "command": command(config, experiment),
        "flags": flags,
        "versions": versions(PACKAGES),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "machine": platform.machine(),
        "git_commit": _git_commit(),
        **more,
    }
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(folder / "config.json", text + "\n")
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
    values = {name: getattr(config, name) for name in kinds(type(config))}
    place = {name: values.pop(name) for name in PLACE if name in values}
    quick = config.QUICK if getattr(config, "quick", False) else ()
    defaults = {name: kind.default for name, kind in kinds(type(config)).items()}
    given = {k: v for k, v in values.items() if v != defaults[k] or k in quick}
    for name in list(given):
        rest = {k: v for k, v in given.items() if k != name}
        with contextlib.suppress(UserError):  # it cannot be left out
            if type(config)(**rest, **place) == config:
                given = rest
    return given


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of Python and of the packages; None for those not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
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
