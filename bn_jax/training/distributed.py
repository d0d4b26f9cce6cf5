"""One run in several processes: how it starts and ends, and values that all of them have."""

from __future__ import annotations

import atexit
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from bn_jax.errors import UserError
from bn_jax.training.meeting import meet, split
from bn_jax.training.peers import FAILURE, Watch

CONNECT = 60.0  # seconds
# JAX's default of 100 is more than the minute in which a process without a peer shall end.
HEARTBEAT = 40  # seconds
# One of these is in the environment wherever JAX detects a cluster. It asks for more than
# that, by the network in part; a notebook on Kubernetes is no cluster, and JAX fails on it.
CLUSTER = (
    "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX",
    "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH",
    "TPU_ML_PLATFORM",
)  # fmt: skip

_watch: Watch | None = None


class Place(NamedTuple):
    """Which process of how many this is, and where process 0 is, `host:port`.

    `local_device_ids` are the numbers of its own devices; None for all of the machine.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = CONNECT,
) -> None:
    """Makes this process one of several; before anything that starts JAX's devices.

    With no argument the cluster says what it is: Slurm, Open MPI, Kubernetes, a TPU pod, as
    JAX detects them; without one this stays one process. Every process calls `shutdown`
    when its run is finished. Where one ends without, killed or by an error, or its machine is
    gone, the others end with status 1 and a line on stderr that names it. Where one is stuck,
    JAX aborts the others after `HEARTBEAT` seconds.

    Args:
      coordinator: `host:port` of process 0; a free port that the others can reach.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
      timeout: seconds in which all must have come.

    Raises:
      UserError: some arguments of three, a number out of range, or twice; process 0 not
        to be reached; a process that does not come; JAX's devices started already.
    """
    global _watch
    if jax.distributed.is_initialized():
        raise UserError("initialize() was called before: call it once, at the start")
    place = _place(coordinator, num_processes, process_id, timeout)
    if place is None or place.num_processes == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would keep SIGTERM from ending the program, and from handlers set before.
    jax.config.update("jax_enable_preemption_service", False)
    peers = meet(*place[:3], timeout)
    _watch = Watch(peers, place.process_id)
    atexit.register(shutdown, FAILURE)
    _join(place, timeout)


def shutdown(status: int = 0) -> None:
    """Waits until every process has finished its run. Does nothing in a run of one.

    Args:
      status: other than 0, this process failed: it ends at once, with that exit status, and
        all others with it.
    """
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.fail(status) if status else watch.finish()


def is_main() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is at the barrier of that name."""
    multihost_utils.sync_global_devices(name)


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


def _place(coordinator, num_processes, process_id, timeout):
    given = {
        "coordinator": coordinator, "num_processes": num_processes, "process_id": process_id,
    }  # fmt: skip
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return _detected(timeout)
    if missing:
        raise UserError(f"{', '.join(missing)} not given: give all of {', '.join(given)}")
    split(coordinator)
    if num_processes < 1:
        raise UserError(f"num_processes={num_processes}: there is at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id={process_id}: with num_processes={num_processes} it is from 0 to "
            f"{num_processes - 1}"
        )
    return Place(coordinator, num_processes, process_id)


def _detected(timeout):
    """What `jax.distributed.initialize()` would detect; it has no public way to be asked."""
    if not any(name in os.environ for name in CLUSTER):
        return None
    try:
        from jax._src.clusters import ClusterEnv

        detected = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout)
        )
    except Exception as e:  # whatever a cluster's own library raises
        raise UserError(
            f"JAX cannot tell what cluster this is ({str(e).splitlines()[0]}): give "
            "coordinator, num_processes and process_id"
        ) from e
    if None not in detected[:3]:
        return Place(*detected)
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:  # Open MPI 5, before JAX 0.12
        raise UserError(
            "this JAX does not know this Open MPI: give coordinator, num_processes and "
            "process_id=$OMPI_COMM_WORLD_RANK"
        )
    return None


def _join(place, timeout):
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=max(int(timeout), 1),
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except RuntimeError as e:  # the devices have been started: JAX says what does that
        raise UserError(" ".join(str(e).split())) from e
