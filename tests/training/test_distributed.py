"""Several processes on this machine, over gloo: equal to one, and ended by each other's end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_processes
from two_processes import BATCH, INPUTS, LABELS, SGD, flat, network

from bn_jax.errors import UserError
from bn_jax.training import distributed
from bn_jax.training.meeting import meet
from bn_jax.training.step import init_state, train_step

ROOT = Path(__file__).parents[2]
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


def said(error):
    """What is from us, and not from JAX; it may stand within a line of a traceback."""
    return re.findall(r"error: process .*", error)


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


@pytest.mark.parametrize("engine", ["jit", "shard_map"])
def test_two_processes_equal_one_process_of_four_devices(trained, engine):
    one = flat(two_processes.train(jax.devices()[:4]))
    for name in (name for name in one if name.startswith(f"['{engine}']")):
        np.testing.assert_allclose(trained[0][name], one[name], rtol=1e-6, atol=1e-6)


def test_everyone_has_the_parts_of_all(trained):
    for results in trained:
        np.testing.assert_array_equal(results["['inputs']"], INPUTS[0])
    assert len(INPUTS[0]) == BATCH


@pytest.mark.parametrize(
    ("what", "dead", "status"),
    [
        ("wait,kill,compute", 1, -signal.SIGKILL),
        ("kill,compute", 0, -signal.SIGKILL),
        ("wait,fail", 1, 1),
        ("compute,user", 1, 2),
        ("sigterm,wait", 0, -signal.SIGTERM),
    ],
)
def test_a_process_that_ends_early_ends_the_others(run, address, what, dead, status):
    number = len(what.split(","))
    codes, errors = run(*((what, "", address, number, i) for i in range(number)))
    assert codes.pop(dead) == status, errors
    del errors[dead]
    assert codes == [1] * (number - 1), errors
    for error in errors:
        (line,) = said(error)
        assert line.startswith(f"error: process {dead} ")


def test_initialize_comes_before_the_devices_are_started(run, address):
    codes, errors = run(*(("late", "", address, 2, i) for i in range(2)))
    assert set(codes) <= {1, 2}, errors  # the second may be ended by the first
    assert all("must be called before any JAX calls" in e for e in errors)


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
        (("here:1234",), "num_processes, process_id not given: give all of coordinator"),
        ((None, 2, 1), "coordinator not given"),
        (("here:1234", 2, 2), "process_id=2: with num_processes=2 it is from 0 to 1"),
        (("here:1234", 2, -1), "process_id=-1: with num_processes=2 it is from 0 to 1"),
        (("here:1234", 0, 0), "num_processes=0: there is at least 1"),
        (("here", 2, 0), "coordinator=here: write host:port"),
        (("here:123456", 2, 0), "coordinator=here:123456: write host:port"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)


def test_what_a_cluster_says_is_looked_at(monkeypatch):
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "many")
    with pytest.raises(UserError, match=r"\(invalid literal .*'many'\): give coordinator, num"):
        distributed.initialize()


def test_an_open_mpi_that_jax_does_not_know(monkeypatch):
    for name in (*distributed.CLUSTER, "KUBERNETES_SERVICE_HOST", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="does not know this Open MPI: give coordinator, num"):
        distributed.initialize()


def together(*calls):
    """What each call of `meet` came to: peers, or the error's message."""
    results = [None] * len(calls)

    def run(i, arguments):
        try:
            results[i] = meet(*arguments)
        except UserError as e:
            results[i] = str(e)

    threads = [threading.Thread(target=run, args=call) for call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_meet_and_are_named(address):
    peers = together(*((address, 3, i, 10) for i in (2, 0, 1)))
    names = {peer.name.split(" (")[0] for peer in peers[1]}
    assert names == {"process 1", "process 2"}
    assert [p.name for p in (*peers[0], *peers[2])] == [f"process 0 ({address})"] * 2
    for peer in (p for some in peers for p in some):
        peer.close()


def test_a_stranger_at_the_port_is_no_process(address):
    host, port = address.split(":")

    def ask():
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n")
            assert stranger.recv(1) == b""

    asked = threading.Timer(0.1, ask)
    asked.start()
    (message,) = together((address, 2, 0, 0.5))
    asked.join()
    assert "1 of 2 processes came" in message


def test_nobody_at_the_coordinator(address):
    (message,) = together((address, 2, 1, 0.3))
    assert message.startswith(f"coordinator={address}: no process 0 there in 0.3 s (connection")
    (message,) = together(("no-such-host.invalid:1234", 2, 1, 0.3))
    assert message.startswith("coordinator=no-such-host.invalid:1234: no process 0 there")


def test_processes_that_do_not_come(address):
    messages = together((address, 4, 0, 0.5), (address, 4, 2, 5))
    assert len(set(messages)) == 1
    assert f"2 of 4 processes came to coordinator={address} in 0.5 s" in messages[0]
    assert "missing: process 1, 3. Start" in messages[0]


def test_a_process_twice(address):
    messages = together((address, 3, 0, 10), (address, 3, 1, 10), (address, 3, 1, 10))
    assert len(set(messages)) == 1
    assert messages[0].startswith("process_id=1 is there twice: process 1 (")


def test_processes_that_count_differently(address):
    messages = together((address, 3, 0, 10), (address, 2, 1, 10))
    assert len(set(messages)) == 1
    assert "num_processes=2 of process 1 (" in messages[0]
    assert "is 3 of process 0" in messages[0]


def test_the_port_is_in_use(address):
    with socket.create_server(("", int(address.split(":")[1]))):
        (message,) = together((address, 2, 0, 1))
    assert "is there another process 0" in message


def test_what_answers_is_no_process_0(address):
    with socket.create_server(("localhost", int(address.split(":")[1]))) as server:

        def reply():
            with server.accept()[0] as visitor:
                visitor.recv(100)
                visitor.sendall(b"\0\0\n")

        answer = threading.Thread(target=reply)
        answer.start()
        (message,) = together((address, 2, 1, 1))
        answer.join()
    assert message.startswith(f"coordinator={address} does not wait for process_id=1")
