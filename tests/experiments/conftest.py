import os
from pathlib import Path

import pytest
from programs import Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """For programs: on the CPU as one device, with a cache of what JAX compiles."""
    without = {"XLA_FLAGS", "TFDS_DATA_DIR", "JAX_ENABLE_COMPILATION_CACHE"}
    return {k: v for k, v in os.environ.items() if k not in without} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def server(tmp_path_factory, environment):
    server = Server(tmp_path_factory.mktemp("programs"), environment)
    yield server
    server.stop()
