"""One run in several processes: how it starts and ends, and values that all of them have.

`jax.distributed` does the work. It aborts the processes that are left (SIGABRT) when one ends
early: at once where they wait for process 0, else after `HEARTBEAT` seconds.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bn_jax.errors import UserError

CONNECT = 60  # seconds
HEARTBEAT = 40  # seconds; JAX's default is 100
FAILURE = 1
# A process may wait so many seconds for others that still train, or write.
SHUTDOWN = 86_400
# One of these is in the environment wherever JAX detects a cluster. A notebook on Kubernetes
# is no cluster, and JAX fails on it.
CLUSTER = (
    "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX",
    "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH",
    "TPU_ML_PLATFORM",
)  # fmt: skip
ALL_THREE = "give coordinator, num_processes and process_id"


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = CONNECT,
    heartbeat: int = HEARTBEAT,
) -> None:
    """Makes this process one of several; before anything that starts JAX's devices.

    With no argument the cluster says what it is: Slurm, Open MPI, Kubernetes, a TPU pod, as
    JAX detects them; without one this stays one process. Every process calls `shutdown`
    when its run is finished; one that ends without has failed, and the others end too.

    Args:
      coordinator: `host:port` of process 0; a free port that the others can reach.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
      timeout: seconds in which all must have come; JAX aborts those that wait longer.
      heartbeat: seconds after which a process that is silent counts as dead.

    Raises:
      UserError: some arguments of three, or one that makes no sense; the port is taken; JAX's
        devices started already; a cluster that JAX cannot read.
    """
    if jax.distributed.is_initialized():
        raise UserError("initialize() was called before: call it once, at the start")
    given = (coordinator, num_processes, process_id) != (None, None, None)
    count = num_processes if given else _tasks()
    if count == 1 or not (given or any(name in os.environ for name in CLUSTER)):
        return
    if coordinator is not None:
        _check_address(coordinator, process_id)
        # For where JAX aborts, without saying whom it misses.
        met = f"process {process_id} of {num_processes} meets the others at {coordinator}"
        print(f"{met} within {timeout} s", file=sys.stderr, flush=True)
    # It would keep SIGTERM from ending the program, and from handlers set before.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if given else None,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except Exception as e:  # whatever a cluster's own library raises
        if isinstance(e, ValueError) and not given and count is None:  # a single TPU, say
            return
        remedy = "" if "before any JAX calls" in str(e) else f": {ALL_THREE}"
        raise UserError(f"{' '.join(str(e).split()).rstrip('.')}{remedy}") from e
    atexit.register(shutdown, FAILURE)


def shutdown(status: int = 0) -> None:
    """Waits until every process has finished its run. Does nothing in a run of one.

    Args:
      status: other than 0, this process failed: it ends at once, with that exit status, and
        JAX ends all others.
    """
    if not jax.distributed.is_initialized():
        return
    if status:
        # An ordinary end would wait for the others.
        sys.stdout.flush()
        os._exit(status)
    jax.distributed.shutdown()


def is_main() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is at the barrier of that name."""
    multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether it is true in any of the processes, all of which must ask."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(multihost_utils.process_allgather(np.int32(bool(flag))).any())


def everyone(tree: Any) -> Any:
    """The whole arrays as numpy, in every process, wherever their parts are.

    All processes must call it, with the same tree, if any leaf is sharded over processes.
    """

    def whole(x):
        local = not isinstance(x, jax.Array) or x.is_fully_addressable
        if not (local or x.is_fully_replicated):
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def _tasks():
    """How many processes Slurm or Open MPI has started; None elsewhere.

    JAX gives the only task of a machine one of its GPUs; it is to have all.
    """
    step = "SLURM_NTASKS" if "SLURM_STEP_NODELIST" in os.environ else "OMPI_COMM_WORLD_SIZE"
    count = os.environ.get(step)
    try:
        return count and int(count)
    except ValueError as e:
        raise UserError(f"{step}={count} is no number: {ALL_THREE}") from e


def _check_address(coordinator, process_id):
    """Raises a UserError for what is no address, or is taken: JAX would crash on it."""
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"coordinator={coordinator}: write host:port, such as 10.0.0.1:1234")
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        if process_id == 0:
            socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
    except OSError as e:
        raise UserError(
            f"coordinator={coordinator}: process 0 cannot use port {port} "
            f"({os.strerror(e.errno or 0).lower()}): choose another port"
        ) from e
