"""Progress with an estimate of the time left: a bar on a terminal, else plain lines."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress
from rich.console import Console

from bn_jax.lab.flags import check_interrupted

EVERY = 5.0  # seconds between plain lines


class Progress:
    """Counts towards a total; `advance` may be called as often as one likes.

    The estimate assumes that what is left goes as fast as what is done. It goes to stderr,
    so that what a command prints can be piped.
    """

    def __init__(self, total: int, console: Console | None = None):
        self._total, self._done, self._text = total, 0, ""
        self._console = console or Console(stderr=True)
        self._last = time.monotonic()
        self._first = None  # (time, done) at the first progress: compilation comes before it
        self._bar = None
        if self._console.is_terminal:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("elapsed,"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("left"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total)

    def describe(self, text: str) -> None:
        """What is being done now."""
        self._text = text
        if self._bar:
            self._bar.update(self._task, description=text)
        else:
            self._line(text)

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more of the total is done; raises a KeyboardInterrupt that got lost.

        `note` says how it stands, after what `describe` said.
        """
        check_interrupted()
        self._done += amount
        text = f"{self._text}, {note}" if note else self._text
        if self._bar:
            self._bar.update(self._task, advance=amount, description=text)
            return
        now = time.monotonic()
        start, before = self._first = self._first or (now, self._done)
        if now - self._last > EVERY and self._done > before:
            left = (now - start) * (self._total - self._done) / (self._done - before)
            share = self._done / self._total
            self._line(f"{text}: {share:.0%} of all done, about {left:.0f} s left")

    def _line(self, text):
        self._last = time.monotonic()
        self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
