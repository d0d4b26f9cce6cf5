"""absl flags from a frozen dataclass, and errors as one line."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from absl import app, flags, logging

from bn_jax.errors import UserError
from bn_jax.lab.fields import about, kinds, listed

C = TypeVar("C")

PARSERS = {int: flags.IntegerParser, float: flags.FloatParser}
USAGE, INTERRUPTED = 2, 130


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
        return listed(value)


def define(config: type, values: flags.FlagValues = flags.FLAGS) -> None:
    """One flag for each field of the dataclass, of the field's type."""
    # As flags of the program, not of this module: `--help` shows those.
    where = {"flag_values": values, "module_name": sys.argv[0]}
    for name, kind in kinds(config).items():
        described = name, kind.default, about(config, name)["help"]
        if kind.item is bool:
            flags.DEFINE_flag(flags.BooleanFlag(*described), **where)
        elif kind.several:
            flags.DEFINE(_List(kind.item), *described, serializer=_Commas(), **where)
        else:
            parser = PARSERS.get(kind.item, flags.ArgumentParser)()
            plain = flags.ArgumentSerializer()
            flags.DEFINE(parser, *described, serializer=plain, **where)


def given(config: type[C], values: flags.FlagValues = flags.FLAGS) -> C:
    """The config of the flags that stand on the command line."""
    names = [name for name in kinds(config) if values[name].present]
    return config(**{name: values[name].value for name in names})


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
