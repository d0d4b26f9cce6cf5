"""How the processes of a run find each other, before JAX starts.

They meet at the coordinator's address, the port that JAX uses afterwards. JAX itself aborts
a process that meets nobody, with a page of C++ that does not say who is missing.

A process says `bn_jax <process> <processes> <host>`; process 0 answers, when all have come,
`welcome`, or else the reason why nothing comes of it.
"""

from __future__ import annotations

import os
import socket
import time

from bn_jax.errors import UserError
from bn_jax.training.peers import Peer

WELCOME = "welcome"
# For what connects and says nothing, and for one attempt to connect; seconds.
PATIENCE = 2.0


def meet(address: str, processes: int, process: int, timeout: float) -> list[Peer]:
    """The peers of a process: of process 0 all others, of one of those process 0.

    Args:
      address: `host:port` of process 0, who waits there for the others.
      processes: how many there are.
      process: which one this is.
      timeout: seconds that the others have to come.

    Raises:
      UserError: process 0 is not to be reached, or cannot use the port; a process does not
        come, comes twice, or counts differently.
    """
    host, port = split(address)
    if process:
        return [_visit(host, port, f"bn_jax {process} {processes}", timeout)]
    deadline = time.monotonic() + timeout
    peers: dict[int, Peer] = {}
    try:
        with _open(address, port, processes) as server:
            while len(peers) < processes - 1:
                _admit(server, peers, processes, deadline, f"{address} in {timeout:g} s")
    except UserError as e:
        for peer in peers.values():
            peer.send(str(e))
            peer.close()
        raise
    for peer in peers.values():
        peer.send(WELCOME)
    return list(peers.values())


def split(address: str) -> tuple[str, int]:
    """`host:port`, or `[IPv6 address]:port`, in two."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"coordinator={address}: write host:port, such as 10.0.0.1:1234")
    return host.strip("[]"), int(port)


def _open(address, port, processes):
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, backlog=processes, dualstack_ipv6=both
        )
    except OSError as e:
        raise UserError(
            f"coordinator={address}: process 0 cannot use port {port} "
            f"({os.strerror(e.errno).lower()}): is there another process 0, or another "
            "program? Choose another port"
        ) from e


def _admit(server, peers, processes, deadline, where):
    """Adds the next process that comes to the peers."""
    server.settimeout(max(deadline - time.monotonic(), 1e-3))
    try:
        connection, (host, *_) = server.accept()
    except TimeoutError:
        missing = [str(i) for i in range(1, processes) if i not in peers]
        named = ", ".join(missing[:9] + ["..."] * (len(missing) > 9))
        raise UserError(
            f"{len(peers) + 1} of {processes} processes came to coordinator={where}; missing: "
            f"process {named}. Start all of them, with this address"
        ) from None
    peer = Peer(connection, host.removeprefix("::ffff:"), PATIENCE)
    match peer.receive().split():
        case ["bn_jax", process, count, name] if (process + count).isdecimal():
            peer.trust(f"process {process} ({name}, {peer.name})")
            _check(peer, peers, int(process), int(count), processes)
            peers[int(process)] = peer
        case _:  # a port scanner, say
            peer.close()


def _check(peer, peers, process, count, processes):
    reason = None
    if count != processes:
        reason = (
            f"num_processes={count} of {peer.name} is {processes} of process 0: start all "
            "with the same"
        )
    elif process in peers:
        reason = (
            f"process_id={process} is there twice: {peers[process].name} and {peer.name}; "
            f"number the processes from 0 to {processes - 1}"
        )
    if reason:
        peer.send(reason)
        peer.close()
        raise UserError(reason)


def _visit(host, port, greeting, timeout):
    """Process 0 as a peer, once it has welcomed this process."""
    address = f"coordinator={host}:{port}"
    # Process 0 was there first, and waits for the others no longer than `timeout`.
    peer = Peer(_connect(host, port, timeout), "", timeout + PATIENCE)
    peer.send(f"{greeting} {socket.gethostname()}")
    answer = peer.receive()
    if answer == WELCOME:
        peer.trust(f"process 0 ({host}:{port})")
        return peer
    peer.close()
    if answer and answer.isprintable():
        raise UserError(answer)
    process = greeting.split()[1]
    raise UserError(
        f"{address} does not wait for process_id={process}: the run has begun with another of "
        "that number, or has ended, or the port is another program's"
    )


def _connect(host, port, timeout):
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=PATIENCE)
            # A port that nobody listens on may be connected to itself.
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()
            reason = "connected to itself"
        except OSError as e:
            reason = (e.strerror or str(e)).lower()
        if time.monotonic() > deadline:
            raise UserError(
                f"coordinator={host}:{port}: no process 0 there in {timeout:g} s ({reason}). "
                "Is it running, on that machine, and is the port open?"
            )
        time.sleep(0.2)
