"""What a user got wrong, as opposed to a fault of the program."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """One line that names the value and what to do; a command prints it and exits with 2."""


def expanded(path: str | Path, name: str) -> Path:
    """The path that a user gave as `name`, with the home folder in the place of its `~`.

    Raises:
      UserError: there is no such home; or the full path is not UTF-8, as Orbax needs it, or
        has a zero byte.
    """
    shown = ascii(str(path))[1:-1]
    try:
        found = Path(path).expanduser()
        zero = b"\0" in str(found.absolute()).encode()
    except RuntimeError as e:
        raise UserError(f"{name}={shown}: there is no such user, or none with a home") from e
    except UnicodeEncodeError as e:
        raise UserError(f"{name}={shown}: its full path is not UTF-8, choose another") from e
    if zero:
        raise UserError(f"{name}={shown}: a path has no zero bytes, choose another")
    return found
