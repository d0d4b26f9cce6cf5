"""One experiment in two processes of two devices each: killed, gone on with, equal to one."""

import json
import os
import signal
import socket
import time

import pytest
from programs import Server

FLAGS = (
    "--features=8", "--steps=20", "--eval_every=5", "--seeds=1", "--learning_rates=0.3",
    "--max_runs_at_once=1", "--checkpoint_every=0", "--batch_size=30",
)  # fmt: skip
TWO_DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
"""


@pytest.fixture(scope="module")
def pair(server, tmp_path_factory, environment):
    other = Server(tmp_path_factory.mktemp("other"), environment)
    yield server, other
    other.stop()


def start(pair, folder, *flags):
    """The numbers of both processes."""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    place = (f"--coordinator=localhost:{port}", "--num_processes=2", f"--workdir={folder}")
    return [
        server.start(*FLAGS, *place, f"--process_id={i}", *flags, before=TWO_DEVICES)
        for i, server in enumerate(pair)
    ]


def losses(folder):
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [json.loads(line)["test_loss"] for line in lines]


@pytest.mark.long
def test_two_processes_killed_and_started_again(pair, server, tmp_path):
    folder, alone = tmp_path / "two", tmp_path / "one"
    _, second = start(pair, folder)
    while not any(p.name.isdecimal() for p in folder.glob("checkpoints/*")):
        time.sleep(0.05)
    os.kill(second, signal.SIGKILL)
    first, killed = (s.wait() for s in pair)
    assert killed.code == -signal.SIGKILL
    assert first.code in (1, -signal.SIGABRT), first  # by its collective, or by JAX

    start(pair, folder)
    first, second = (s.wait() for s in pair)
    assert (first.code, second.code) == (0, 0), (first.err, second.err)
    assert str(folder / "report.html") in first.out
    assert "Time: total" in first.out
    assert "Time: total" not in second.out
    assert (folder / "report.html").exists()

    assert server.run(*FLAGS, "--parallel=single", f"--workdir={alone}").code == 0
    expected = losses(alone)
    assert len(expected) == 2
    for found, one in zip(losses(folder), expected, strict=True):
        assert found == pytest.approx(one, abs=3e-6)

    start(pair, tmp_path / "grid", "--parallel=grid")  # one run, and three that fill up
    assert [s.wait().code for s in pair] == [0, 0]
    for found, one in zip(losses(tmp_path / "grid"), expected, strict=True):
        assert found == pytest.approx(one, abs=3e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--parallel=pmap",), "--parallel=pmap is for one process: choose shard_map, jit"),
        (("--workdir=",), "--workdir: several processes need one that all of them see"),
    ],
)
def test_what_several_processes_cannot_do(pair, tmp_path, flags, message):
    start(pair, tmp_path / "w", *flags)
    done = [s.wait() for s in pair]
    # One may be ended by the other's end.
    assert {d.code for d in done} <= {1, 2, -signal.SIGABRT}
    assert any(d.code == 2 and f"error: {message}" in d.err for d in done), done
