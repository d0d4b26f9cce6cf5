"""SIGTERM, with which a cluster says that it will soon take the machine away."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator

# Of sysexits.h, a temporary failure: what started the program may start it again.
STOPPED = 75


@dataclasses.dataclass
class Stop:
    """Whether SIGTERM came: save, and exit with `STOPPED`."""

    requested: bool = False


@contextlib.contextmanager
def on_sigterm() -> Iterator[Stop]:
    """What SIGTERM does inside: the first sets `requested`, the second kills at once.

    To be entered in the main thread; afterwards SIGTERM does what it did before.
    """
    stop = Stop()

    def request(*_):
        stop.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
