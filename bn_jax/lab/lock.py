"""One process at a time: a lock that names the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from bn_jax.errors import UserError

# Of file systems that have no locks, as some that clusters share.
WITHOUT = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Inside, this process alone has the lock `path`, a file that is removed afterwards.

    The kernel frees the lock of a process that has ended, however it ended, and on NFS the
    server does. Where the file system has no locks, a process of this host that the file names
    and that is gone has lost it.

    Args:
      path: of the lock.
      what: is locked, for the message.

    Raises:
      UserError: another process has the lock.
      OSError: the file cannot be made.
    """
    file = _take(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _take(path, what):
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _free(file):
                raise UserError(
                    f"{what} is in use by {_named(_holder(file))}: wait until that has ended, "
                    f"or choose another (if it is gone, delete {path})"
                )
            if _is_at(file, path):
                os.ftruncate(file, 0)
                about = {"pid": os.getpid(), "host": socket.gethostname()}
                os.pwrite(file, json.dumps(about).encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _free(file):
    """Locks the file, if no other process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in WITHOUT:
            raise
        return _gone(_holder(file))
    return True


def _is_at(file, path):
    """Whether who had the lock has not removed the file since it was opened."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(file):
    """What the file says of the process; {} where that has not been written yet."""
    try:
        return json.loads(os.pread(file, 1000, 0))
    except ValueError:
        return {}


def _gone(holder):
    if not holder or holder["host"] != socket.gethostname():
        return not holder
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return holder["pid"] == os.getpid()


def _named(holder):
    return "process {pid} on {host}".format(**holder) if holder else "another process"
