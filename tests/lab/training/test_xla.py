"""XLA's flags and options, the allocator, what is kept compiled; a user's choice stays."""

import importlib.metadata
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bn_jax import xla


@pytest.fixture
def set_flags(monkeypatch):
    """`set_flags(given, version)`: XLA_FLAGS after `xla.set_flags()` with this jaxlib."""

    def call(given, version):
        monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
        if given is None:
            monkeypatch.delenv("XLA_FLAGS", raising=False)
        else:
            monkeypatch.setenv("XLA_FLAGS", given)
        returned = xla.set_flags()
        assert returned == os.environ.get("XLA_FLAGS", "")
        return returned

    monkeypatch.setenv("XLA_FLAGS", "")  # To be as it was after the test.
    return call


FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


@pytest.mark.parametrize("version", ["0.10.2", "0.10.10", "0.11.0", "0.12.0", "0.12.9"])
def test_the_flag_is_set_where_it_is_known(set_flags, version):
    assert set_flags(None, version) == FLAG
    assert set_flags("--xla_dump_to=x", version) == f"--xla_dump_to=x {FLAG}"


@pytest.mark.parametrize("version", ["0.4.38", "0.9.2", "0.10.1", "0.13.0", "0.13", "1.0.0"])
def test_the_flag_is_not_set_where_it_may_abort(set_flags, version):
    assert set_flags(None, version) == ""
    assert set_flags("--xla_dump_to=x", version) == "--xla_dump_to=x"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.11.0.dev20260101", FLAG),
        ("0.11.1rc1", FLAG),
        ("0.12.1+local", FLAG),
        ("0.10.2.dev1", None),  # Either would do: nobody knows.
        ("0.13.0rc1", ""),
        ("0.13.0.dev20260101", ""),
        ("0.10.1rc1", ""),
    ],
)
def test_versions_before_a_release(set_flags, version, expected):
    assert set_flags(None, version) in ({"", FLAG} if expected is None else {expected})


@pytest.mark.parametrize("value", ["", "all", "-individual_convolution,-reduce"])
def test_a_users_own_choice_stays(set_flags, value):
    given = f"--xla_cpu_experimental_ynn_fusion_type={value} --xla_dump_to=x"
    assert set_flags(given, "0.10.2") == given


def test_a_file_of_flags_stays_alone(set_flags, tmp_path):
    """XLA takes what does not begin with a dash for a name; with a flag after it, it aborts."""
    path = tmp_path / "flags"
    path.write_text("--xla_dump_to=x")
    assert set_flags(str(path), "0.10.2") == str(path)
    assert set_flags(" --xla_dump_to=x", "0.10.2") == f"--xla_dump_to=x {FLAG}"


LEVEL, LIBRARY = "xla_backend_optimization_level", "xla_cpu_experimental_ynn_fusion_type"
OPTIONS = {
    "run_once": {LEVEL: 0},
    "sorts": {LEVEL: 1},
    "dense_sweeps_on_cpu": {LIBRARY: ""},
}
WITHOUT_LEVEL = OPTIONS | {"run_once": {}, "sorts": {}}
WITHOUT_LIBRARY = OPTIONS | {"dense_sweeps_on_cpu": {}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", OPTIONS),
        (FLAG, OPTIONS),  # as `set_flags` leaves it
        (f"--a_flag=-individual_dot --{LEVEL}_of_another=3", OPTIONS),
        (f"--{LEVEL}=3", WITHOUT_LEVEL),
        (f"--a_flag=1 --{LEVEL}=0 {FLAG}", WITHOUT_LEVEL),
        (FLAG.replace("convolution", "dot"), WITHOUT_LIBRARY),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_options_are_given_unless_the_user_has_chosen(
    given, expected, in_file, monkeypatch, tmp_path
):
    """As options they would win over flags, which then had no effect."""
    (tmp_path / "flags").write_text(given)
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags") if in_file else given)
    assert xla.compiler_options() == expected


def test_this_jaxlib_knows_the_options(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    program = jax.jit(lambda x: x.sum(0)).lower(jnp.ones((640, 500)))
    for kind, options in xla.compiler_options().items():
        ynn = "ynn" in program.compile(options).as_text()
        assert ynn == (kind != "dense_sweeps_on_cpu")


KEPT = """
import sys
from pathlib import Path
import jax
from bn_jax.xla import keep_compiled
folder = Path(sys.argv[1], "compiled")
keep_compiled(folder)
chosen = jax.config.jax_compilation_cache_dir
seconds = jax.config.jax_persistent_cache_min_compile_time_secs
print(folder.exists(), chosen == str(folder), seconds)
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "True True 0.1"),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}, "True True 7.0"),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}, "True True 1.0"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "False False 1.0"),
        ({"JAX_COMPILATION_CACHE_DIR": "/of/the/user"}, "False False 1.0"),
    ],
)
def test_programs_are_kept_unless_the_user_has_chosen(chosen, expected, tmp_path):
    assert kept_below(tmp_path, chosen) == expected


def test_programs_are_not_kept_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    assert kept_below(tmp_path / "file", {}) == "False False 1.0"


def kept_below(folder, chosen):
    names = ("JAX_COMPILATION", "JAX_ENABLE_COMPILATION", "JAX_PERSISTENT")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    command = [sys.executable, "-c", KEPT, str(folder)]
    ended = subprocess.run(command, env=plain | chosen, capture_output=True, text=True)
    return ended.stdout.strip()


FAULTS = """
import resource
import jax
import jax.numpy as jnp
from bn_jax.xla import keep_memory
kept = keep_memory()
square = jax.jit(lambda x: x * x)
x = jnp.ones(1 << 25)  # 128 MiB
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(square(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The least: now and then something small lies in the way.
print(kept, min(faults() for _ in range(8)))
"""


@pytest.mark.parametrize(
    ("chosen", "keeps"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": "glibc.rtld.nns=4"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, False),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False),
        ({"JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"}, False),
    ],
)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_is_kept_unless_the_user_has_chosen(chosen, keeps):
    names = ("MALLOC_", "GLIBC_", "JAX_CPU_ENABLE")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    command = [sys.executable, "-c", FAULTS]
    ended = subprocess.run(command, env=plain | chosen, capture_output=True, text=True)
    kept, faults = ended.stdout.split()
    assert kept == str(keeps)
    assert (int(faults) < 1000) == keeps  # or 32,768, of 4 KiB
