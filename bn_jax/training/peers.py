"""Connections between the processes of a run, by which each hears of another's end.

Whatever ends a process, its system closes its connections; and a machine that answers no
more is noticed by the system of the others. Process 0 has a connection to each of the
others, and passes the news on. One that is neither ended nor gone but stuck, JAX's heartbeats
notice.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from typing import NoReturn

# At the end of a run each sends this; else the reason why there is an end.
DONE = "done"
FAILURE = 1
# Seconds without traffic before a machine is asked for a sign of life, seconds between
# such questions, and how many go unanswered: 30 seconds in all.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class Peer:
    """Another process: its name in messages, and lines to and from it."""

    def __init__(self, connection: socket.socket, name: str, patience: float):
        """`patience`: seconds to wait for a line, before `trust`."""
        self.name = name
        self._connection = connection
        connection.settimeout(patience)
        # Unbuffered, for what is in a buffer no selector sees.
        self._lines = connection.makefile("rwb", buffering=0)

    def send(self, line: str) -> None:
        """Sends the line, if there is still somebody to hear it."""
        with contextlib.suppress(OSError):
            self._lines.write(line.encode() + b"\n")

    def receive(self) -> str:
        """The next line; an empty one when the peer is gone, or silent for too long."""
        with contextlib.suppress(OSError):
            return self._lines.readline(1000).decode(errors="replace").strip()
        return ""

    def trust(self, name: str) -> None:
        """From now on `receive` waits without limit, as long as the machine is there."""
        self.name = name
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            if hasattr(socket, option):
                self._connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def close(self) -> None:
        """Ends the connection."""
        self._lines.close()
        self._connection.close()

    def fileno(self) -> int:
        """For selectors."""
        return self._connection.fileno()


class Watch:
    """Ends this process, with a line on stderr and status 1, when one of its peers is gone."""

    def __init__(self, peers: list[Peer], process: int):
        """`peers`: of process 0 all others, of another process 0."""
        self._peers, self._process = peers, process
        self._all_done = threading.Event()
        # Held for good by what ends the process: how others follow it is no news then.
        self._leaving = threading.Lock()
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def finish(self) -> None:
        """Waits until every process has come here."""
        if self._process:
            self._tell(DONE)
        self._all_done.wait()
        if not self._process:
            self._tell(DONE)

    def fail(self, status: int) -> NoReturn:
        """Ends this process with the status, and the others with it."""
        # If it failed because another is gone, that is about to be heard.
        time.sleep(1)
        with self._leaving:
            self._spread(f"process {self._process} has ended before the others")
            _leave(status)

    def _listen(self):
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    self._hear(key.fileobj)
                    selector.unregister(key.fileobj)
        self._all_done.set()

    def _hear(self, peer):
        line = peer.receive()
        if line == DONE:
            return
        with self._leaving:
            reason = line or f"{peer.name} has ended before the others"
            print(f"error: {reason}; see its own output", file=sys.stderr, flush=True)
            if not self._process:
                self._spread(reason)
            _leave(FAILURE)

    def _spread(self, reason):
        self._tell(reason)
        # The others shall hear it from here first, and not that a collective has failed.
        time.sleep(0.5)

    def _tell(self, line):
        for peer in self._peers:
            peer.send(line)


def _leave(status):
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    # An ordinary end would wait for the others, in JAX, for minutes.
    os._exit(status)
