"""Calls outside `jit` as one program, traced and compiled once for all that are alike.

Operation by operation, a gradient is derived, and its rule traced and transposed, anew in
every call. Within a `jit` nothing changes: the program is inlined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

R = TypeVar("R")


def one_program(f: Callable[..., R]) -> Callable[..., R]:
    """f of a tuple of settings and of arrays (or None).

    It stays as it is over a mapped axis, `settings.axis_name`, where the derivative depends on
    the place it is taken in, and with settings that are arrays or somebody else's functions:
    what these refer to may change between two calls.
    """
    program = jax.jit(f, inline=True, static_argnums=0)

    @functools.wraps(f)
    def call(settings: tuple[Any, ...], *arrays: Any) -> R:
        mapped = getattr(settings, "axis_name", None) is not None
        alone = mapped or not all(map(_is_constant, settings))
        return (f if alone else program)(settings, *arrays)

    return call


def _is_constant(v):
    """Whether v can be hashed, and is no function but one of JAX or of this package."""
    try:
        hash(v)
    except TypeError:
        return False
    module = f"{getattr(v, '__module__', '')}."
    return not callable(v) or module.startswith(("jax.", "bn_jax.core."))
