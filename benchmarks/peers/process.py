"""A side in a process of its own, so that XLA's flags, backends and threads are its own."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

from benchmarks.peers import flax_loop, keras_fit, ours, torch_loop
from benchmarks.peers.task import Task
from bn_jax.errors import UserError

_programs: dict[str, Callable[[], Any]] = {}


class Process:
    """Programs that a function prepares in a new process, to be called by name."""

    def __init__(self, prepare: Callable[..., dict], *args: Any, **environment: str):
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with mock.patch.dict(os.environ, environment):
            self._pool.submit(_prepare, prepare, *args).result()

    def call(self, name: str) -> Any:
        """Runs a program; returns when it has ended."""
        return self._pool.submit(_call, name).result()

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


def _prepare(prepare, *args):
    _programs.update(prepare(*args))


def _call(name):
    result = _programs[name]()
    return result if isinstance(result, int | float) else None


SIDES: dict[str, tuple[str, Callable[..., dict], dict[str, str]]] = {
    "bn_jax": ("jax", ours.prepare, {}),
    "plain Flax": ("flax", flax_loop.prepare, {}),
    "torch": ("torch", torch_loop.prepare, {}),
    "Keras on JAX": ("keras", keras_fit.prepare, {"KERAS_BACKEND": "jax"}),
    "Keras on torch": ("keras", keras_fit.prepare, {"KERAS_BACKEND": "torch"}),
}


def check_sides(names: Sequence[str]) -> None:
    """Raises a UserError for a side that there is not."""
    for name in names:
        if name not in SIDES:
            raise UserError(f"--sides: {name!r} is none of {', '.join(SIDES)}")


def sides(names: Sequence[str], task: Task) -> dict[str, Process]:
    """Those of the names whose packages are installed."""
    chosen = {name: SIDES[name] for name in names}
    return {
        name: Process(prepare, task, **environment)
        for name, (package, prepare, environment) in chosen.items()
        if importlib.util.find_spec(package)
    }


def programs(processes: dict[str, Process], name: str) -> dict[str, Callable[[], Any]]:
    """One program of every side, to be timed."""
    return {side: functools.partial(p.call, name) for side, p in processes.items()}
