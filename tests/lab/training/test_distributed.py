"""Several processes on this machine, over gloo: equal to one, and ended by each other's end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_processes
from two_processes import BATCH, INPUTS, LABELS, SGD, flat, network

from bn_jax.errors import UserError
from bn_jax.lab.training import distributed
from bn_jax.lab.training.step import init_state, train_step

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": str(ROOT),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# Variables by which a cluster would be detected, if the tests run on one.
for name in distributed.CLUSTER:
    ENVIRONMENT.pop(name, None)


def free_port(first=0, last=0):
    """A port that nobody uses, of these; by default any."""
    for port in range(first, last + 1):
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return s.getsockname()[1]
    raise OSError("all ports are in use")


@pytest.fixture
def address():
    return f"localhost:{free_port()}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run((what, file, ...), ...)`: exit status and standard error of each process."""
    folder = tmp_path_factory.mktemp("errors")
    command = [sys.executable, two_processes.__file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes) as server:

        def run(*processes, environments=None):
            environments = environments or [{}] * len(processes)
            files = [folder / str(i) for i in range(len(processes))]
            for file in files:
                file.write_text("")
            jobs = zip(processes, environments, map(str, files), strict=True)
            print(json.dumps(list(jobs)), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline()), [f.read_text() for f in files]

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """What each of two processes has after training, as two tasks of a Slurm job."""
    file = tmp_path_factory.mktemp("trained") / "results"
    # JAX's port on Slurm is 61440 + job % 4096. Another worker may look for one right now.
    job = free_port(61440 + os.getpid() % 4000, 65535) - 61440
    slurm = {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip
    tasks = [slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    codes, errors = run(*[("train", str(file))] * 2, environments=tasks)
    assert codes == [0, 0], errors
    return [dict(np.load(f"{file}.{i}.npz")) for i in range(2)]


@pytest.fixture(scope="module")
def alone():
    """Parameters, statistics and losses of one device."""
    step = jax.jit(train_step, static_argnums=(3, 4))
    state = init_state(jax.random.key(0), network(), SGD, jnp.asarray(INPUTS[0]))
    losses = []
    for x, y in zip(INPUTS, LABELS, strict=True):
        state, means = step(state, x, y, network(), SGD)
        losses.append(means.loss)
    return flat([state.params, state.batch_stats, losses])


@pytest.mark.parametrize("engine", ["jit", "shard_map"])
@pytest.mark.parametrize("process", [0, 1])
def test_two_processes_of_two_devices_equal_one_device(trained, alone, engine, process):
    for name, value in alone.items():
        got = trained[process][f"['{engine}']{name}"]
        np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_everyone_has_the_parts_of_all(trained):
    for results in trained:
        np.testing.assert_array_equal(results["['inputs']"], INPUTS[0])
    assert len(INPUTS[0]) == BATCH


@pytest.mark.parametrize(
    ("what", "dead", "status"),
    [
        ("compute,kill", 1, -signal.SIGKILL),
        ("kill,wait", 0, -signal.SIGKILL),
        ("wait,fail", 1, 1),
        ("user,compute", 0, 2),
    ],
)
def test_a_process_that_ends_early_ends_the_other(run, address, what, dead, status):
    start = time.monotonic()
    codes, errors = run(*((what, "", address, 2, i) for i in range(2)))
    assert codes.pop(dead) == status, errors
    assert codes[0] in (-signal.SIGABRT, 1), errors
    assert f"process {1 - dead} of 2 meets the others at {address}" in errors[1 - dead]
    # JAX notices within one more heartbeat.
    assert time.monotonic() - start < 2 * two_processes.HEARTBEAT + 20


def test_initialize_comes_before_the_devices_are_started(run, address):
    codes, errors = run(("late", "", address, 2, 1))
    assert codes == [2]
    assert "must be called before any JAX calls" in errors[0]


def test_without_arguments_or_a_cluster_there_is_one_process(monkeypatch):
    for name in distributed.CLUSTER:
        monkeypatch.delenv(name, raising=False)
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    distributed.shutdown()
    distributed.barrier("of one")
    assert distributed.is_main()


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"},  # one task
        {"SLURM_NTASKS": "2"},  # a batch script, outside srun
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # no Job
    ],
)
def test_what_is_no_cluster_is_one_process(monkeypatch, environment):
    job = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name in (*distributed.CLUSTER, "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (job | environment).items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (None, 2, 1),
            "coordinator_address should be defined: give coordinator, num_processes",
        ),
        (("here:1234", 2, 2), "process_id < num_processes. Got process_id=2, num_processes=2"),
        (("here:1234", 0, 0), "num_processes=0: give coordinator"),
        (("here", 2, 0), "coordinator=here: write host:port"),
        (("here:123456", 2, 1), "coordinator=here:123456: write host:port"),
    ],
)
def test_arguments_that_make_no_sense(run, arguments, message):
    codes, errors = run(("train", "", *arguments))
    assert codes == [2]
    assert message in errors[0]


def test_a_port_that_is_taken(address):
    with (
        socket.create_server(("", int(address.split(":")[1]))),
        pytest.raises(
            UserError, match=r"process 0 cannot use port \d+ \(address already in use"
        ),
    ):
        distributed.initialize(address, 2, 0)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("many", "SLURM_NTASKS=many is no number"), ("2", "'many': give coordinator, num_proc")],
)
def test_what_a_cluster_says_is_looked_at(run, tasks, message):
    names = ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID")
    slurm = {f"SLURM_{name}": "many" for name in names} | {"SLURM_NTASKS": tasks}
    codes, errors = run(("train", ""), environments=[slurm])
    assert codes == [2]
    assert message in errors[0]
