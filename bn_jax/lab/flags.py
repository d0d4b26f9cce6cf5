"""absl flags from a frozen dataclass, and errors as one line."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

from absl import app, flags, logging

from bn_jax.errors import UserError, expanded

C = TypeVar("C")

# JAX computes in float32 and counts in int32.
SMALLEST, LARGEST, MOST = 1.2e-38, 3.4e38, 2**31 - 1
# Flags that are paths wherever there is such a flag.
PATHS = ("cache_dir", "checkpoint", "data_dir", "inputs", "markdown", "out", "runs", "workdir",
         "workdirs")  # fmt: skip

USAGE, INTERRUPTED = 2, 130


def flag(default: Any, text: str) -> Any:
    """A dataclass field that is a flag, with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


def check_values(config: Any) -> None:
    """What holds for every flag: numbers are finite, within 32 bits, and paths are paths.

    Raises:
      UserError: naming the flag and its value.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name == "workdir" and value is None:
            value = "runs"
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float) and not abs(one) <= LARGEST:
                raise UserError(f"--{name}={one}: it must be finite, at most {LARGEST}")
            if isinstance(one, int) and not abs(one) <= MOST:
                raise UserError(f"--{name}={one}: it must be at most {MOST}, as JAX counts")
            if name in PATHS and one and isinstance(one, str):
                expanded(one, f"--{name}")


class Quick:
    """A dataclass whose field `quick` changes others, as `QUICK` says; what is given stands.

    Given are the keywords of the constructor, whatever their values; with `main` the flags
    that stand on the command line.
    """

    QUICK: ClassVar[dict[str, Any]] = {}
    quick: bool
    _given: frozenset[str]

    def __new__(cls, **given: Any):
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    def apply_quick(self) -> None:
        """To be called by `__post_init__`."""
        if self.quick:
            for name in self.QUICK.keys() - self._given:
                object.__setattr__(self, name, self.QUICK[name])


class _List(flags.ArgumentParser):
    """Comma-separated items of one type, as a tuple."""

    def __init__(self, item: Callable[[str], Any]):
        super().__init__()
        self._item = item
        self.syntactic_help = f"a comma-separated list of {item.__name__}"

    def parse(self, argument):
        if not isinstance(argument, str):
            return tuple(argument)
        return tuple(self._item(a.strip()) for a in argument.split(",") if a.strip())


class _Commas(flags.ArgumentSerializer):
    def serialize(self, value):
        return ",".join(str(v) for v in value)


def define(config: type, values: flags.FlagValues = flags.FLAGS) -> None:
    """One flag for each field of the dataclass, of the field's type."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, default = _without_none(hints[field.name]), typing.cast(Any, field.default)
        described, text = (field.name, default), field.metadata["help"]
        # As flags of the program, not of this module: `--help` shows those.
        where = {"flag_values": values, "module_name": sys.argv[0]}
        if kind is bool:
            flags.DEFINE_flag(flags.BooleanFlag(*described, text), **where)
        elif typing.get_origin(kind) is tuple:
            parser = _List(typing.get_args(kind)[0])
            flags.DEFINE(parser, *described, text, serializer=_Commas(), **where)
        else:
            parser = {int: flags.IntegerParser, float: flags.FloatParser}.get(
                kind, flags.ArgumentParser
            )()
            flags.DEFINE(
                parser, *described, text, serializer=flags.ArgumentSerializer(), **where
            )


def _without_none(kind):
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind
    return next(a for a in typing.get_args(kind) if a is not type(None))


def given(config: type[C], values: flags.FlagValues = flags.FLAGS) -> C:
    """The config of the flags that stand on the command line."""
    names = [f.name for f in dataclasses.fields(typing.cast(Any, config))]
    return config(**{name: values[name].value for name in names if values[name].present})


def main(config: type[C], run: str | Callable[[C], Any]) -> None:
    """Parses the flags into a `config`, and runs.

    What the user can mend, a full disk among it, ends in one line and exit status 2, an
    interruption in one line and 130.

    Args:
      config: the dataclass of the flags.
      run: a function of the config; or the module with such a `run` and its `Config`, imported
        once the flags are parsed, so that `--help` does not wait seconds for JAX.
    """
    define(config)
    # `--help` shows the program's docstring; a package's __main__ has none of its own.
    about = config.__module__ if isinstance(run, str) else run.__module__
    sys.modules["__main__"].__doc__ = sys.modules[about].__doc__

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as e:
            _stop(str(e))
        if rest[1:]:
            _stop(f"unexpected argument {rest[1]!r}: options look like --name=value")
        if flags.FLAGS["verbosity"].using_default_value:
            # JAX remarks on TPU libraries that are not there at the level of INFO.
            flags.FLAGS.verbosity = logging.WARNING
        return rest

    def start(_):
        signal.signal(signal.SIGINT, _interrupt)
        # What cannot be written in the terminal's encoding is no reason to fail.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            parsed = given(config)
            if isinstance(run, str):
                module = importlib.import_module(run)
                module.run(given(module.Config))
            else:
                run(parsed)
            _leave_others(0)
        except UserError as e:
            _stop(str(e))
        except TimeoutError:  # another process of the run is gone: no fault of the flags
            raise
        except OSError as e:
            _stop(f"{e.filename or 'a file'}: {e.strerror or e}; finished runs are kept")
        except Stopped:
            from bn_jax.lab.training.signals import STOPPED

            _say("stopped by SIGTERM; the same command with this workdir goes on")
            _leave_others(0)  # they have stopped as well
            sys.exit(STOPPED)
        except KeyboardInterrupt:
            _say("interrupted; records of finished runs are kept")
            # XLA's threads may be compiling: their destructors would crash.
            os._exit(INTERRUPTED)

    app.run(start, flags_parser=parse)


_interrupted = threading.Event()


class Stopped(Exception):  # noqa: N818
    """SIGTERM came, and all that was done is saved: no fault."""


def check_interrupted() -> None:
    """Raises a KeyboardInterrupt if there was one.

    Where it came while JAX's callback of the garbage collector ran, nobody heard of it.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _interrupt(_, frame):
    _interrupted.set()
    if frame.f_code.co_name != "_xla_gc_callback":  # where Python prints it, and goes on
        raise KeyboardInterrupt


def _stop(message: str) -> NoReturn:
    _say(message)
    _leave_others(USAGE)
    sys.exit(USAGE)


def _leave_others(status):
    """Where several processes are one run, this one has finished, or it has failed."""
    if distributed := sys.modules.get("bn_jax.lab.training.distributed"):
        distributed.shutdown(status)


def _say(message):
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
