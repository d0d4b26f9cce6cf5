"""A side in a process of its own, so that XLA's flags, backends and threads are its own."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

from benchmarks.peers import Task, flax_loop, keras_fit, ours, torch_loop
from bn_jax.errors import UserError
from bn_jax.lab.sweeps.timing import interleave, median_ratio

OURS = "bn_jax"
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
    _programs[name]()


# The package, the function, and what its environment has.
SIDES: dict[str, tuple[str, Callable[..., dict], dict[str, str]]] = {
    OURS: ("jax", ours.prepare, {}),
    "plain Flax": ("flax", flax_loop.prepare, {}),
    "torch": ("torch", torch_loop.prepare, {}),
    "Keras on JAX": ("keras", keras_fit.prepare, {"KERAS_BACKEND": "jax"}),
    "Keras on torch": ("keras", keras_fit.prepare, {"KERAS_BACKEND": "torch"}),
}


def sides(names: Sequence[str], task: Task) -> dict[str, Process]:
    """Those of the names whose packages are installed.

    Raises:
      UserError: there is no such side.
    """
    if unknown := set(names) - SIDES.keys():
        raise UserError(f"--sides: {min(unknown)!r} is none of {', '.join(SIDES)}")
    return {
        name: Process(prepare, task, **environment)
        for name, (package, prepare, environment) in SIDES.items()
        if name in names and importlib.util.find_spec(package)
    }


class Times(dict[str, list[float]]):
    """Seconds of a program, of every side in every round."""

    @classmethod
    def of(cls, processes: dict[str, Process], program: str, rounds: int) -> Times:
        """All sides take turns."""
        calls = {side: functools.partial(p.call, program) for side, p in processes.items()}
        return cls(interleave(calls, rounds))

    def medians(self) -> dict[str, float]:
        """Over the rounds."""
        return {side: statistics.median(seconds) for side, seconds in self.items()}

    def ratio(self, side: str, other: str) -> float:
        """The median over the rounds of a side's time over another's, NaN where one is not."""
        return median_ratio(self, side, other) if {side, other} <= self.keys() else float("nan")
