"""An object of the user's, by `package.module:name` or `file.py:name`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from bn_jax.errors import UserError, expanded


def is_named(text: str) -> bool:
    """Returns whether the text says where an object is."""
    return ":" in text


def load_object(text: str, flag: str) -> Any:
    """Returns the object that a flag's text names; `name` may have dots.

    The file's folder, or the folder that one is in, is where its own imports are found.

    Raises:
      UserError: no such file, module or name; or the module does not import: its own error is
        shown.
    """
    place, _, name = text.rpartition(":")
    if not (place and name):
        raise UserError(f"--{flag}={text}: say package.module:name or file.py:name")
    found: Any = _imported(place, f"--{flag}={text}", flag)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in getattr(found, "__dict__", {}) if not n.startswith("_")]
            there = ", ".join(public[-10:]) or "nothing"
            raise UserError(f"--{flag}={text}: {place} has no {part}: there is {there}")
        found = getattr(found, part)
    return found


def _imported(place: str, shown: str, flag: str) -> ModuleType:
    is_file = place.endswith(".py")
    path = expanded(place, flag) if is_file else None
    if path and not path.is_file():
        raise UserError(f"{shown}: there is no file {place}")
    try:
        with _importing_from(path.parent if path else Path.cwd()):
            return _of_file(path.resolve()) if path else importlib.import_module(place)
    except (Exception, SystemExit) as e:
        missing = e.name if isinstance(e, ModuleNotFoundError) else None
        if missing and not path and f"{place}.".startswith(f"{missing}."):
            raise UserError(f"{shown}: there is no module {missing}") from e
        what = (str(e).splitlines() or [""])[0]
        if not isinstance(e, SyntaxError):  # which says where it is
            frame = traceback.extract_tb(e.__traceback__)[-1]
            what += f" ({Path(frame.filename).name}, line {frame.lineno})"
        raise UserError(f"{shown}: it does not import: {type(e).__name__}: {what}") from e


def _of_file(path: Path) -> ModuleType:
    """The module of a file, which is run once."""
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if known is not None or not name.isidentifier():
        name = f"_of_file_{abs(hash(path))}"
        if name in sys.modules:
            return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for what its classes are pickled by, and dataclasses
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Within it the folder is the first place where modules are looked for."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
