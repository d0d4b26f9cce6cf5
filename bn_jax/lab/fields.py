"""Dataclasses whose fields are flags: what each may be, and how a config is checked."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypedDict, Unpack

from bn_jax.errors import UserError, expanded

# JAX computes in float32 and counts in int32.
SMALLEST, LARGEST, MOST = 1.2e-38, 3.4e38, 2**31 - 1
# Flags that are paths wherever there is such a flag.
PATHS = ("cache_dir", "checkpoint", "data_dir", "inputs", "markdown", "out", "runs", "workdir",
         "workdirs")  # fmt: skip
LIMITS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


class Allowed(TypedDict, total=False):
    """The values that a flag may have, or that each item of a list may have."""

    at_least: float
    above: float
    at_most: float
    below: float
    choices: Sequence[str | int]
    each_once: bool  # a list has one item or more, and no item twice


def flag(default: Any, text: str | None = None, **allowed: Unpack[Allowed]) -> Any:
    """A dataclass field that is a flag.

    Where a base class has the flag too, what is not given here is as there.
    """
    helped = {} if text is None else {"help": text}
    return dataclasses.field(default=default, metadata={**allowed, **helped})


def fixed(value: Any) -> Any:
    """A dataclass field of a base class that is no flag here, but always has this value."""
    return dataclasses.field(default=value, init=False)


class Kind(NamedTuple):
    """A flag's type (of its items, if it is a list), whether it may be None, its default."""

    item: type
    several: bool
    optional: bool
    default: Any


@functools.cache
def kinds(config: type) -> dict[str, Kind]:
    """The type of every flag of the dataclass, by name."""
    hints = typing.get_type_hints(config)
    return {
        f.name: _kind(hints[f.name], f.default) for f in dataclasses.fields(config) if f.init
    }


def _kind(hint, default):
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kind = next(a for a in typing.get_args(hint) if a is not type(None)) if union else hint
    several = typing.get_origin(kind) is tuple
    return Kind(typing.get_args(kind)[0] if several else kind, several, union, default)


@functools.cache
def about(config: type, name: str) -> Mapping[str, Any]:
    """The help text of a flag and what it allows, of the nearest class that says so."""
    parents = (getattr(c, "__dataclass_fields__", {}) for c in config.__mro__)
    return collections.ChainMap(*(dict(p[name].metadata) for p in parents if name in p))


@dataclasses.dataclass(frozen=True)
class Flags:
    """A group of flags. An experiment's config is a subclass of the groups that it needs.

    A field `quick` changes others, as `QUICK` says. What is given stands: the keywords of the
    constructor, whatever their values; with `main` the flags on the command line.

    Raises:
      UserError: a value is not allowed.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {}
    _given: ClassVar[frozenset[str]]  # of this object; no field

    def __new__(cls, **given: Any):
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    def __post_init__(self):
        quick = self.QUICK if getattr(self, "quick", False) else {}
        for name, value in quick.items():
            if name not in self._given:
                object.__setattr__(self, name, value)
        for name, kind in kinds(type(self)).items():
            value = getattr(self, name)
            if kind.several and value is not None and not isinstance(value, tuple):
                own = tuple(value) if isinstance(value, list) else (value,)
                object.__setattr__(self, name, own)
        self._check_values()
        self.check()

    def check(self) -> None:
        """Raises a UserError for flags that make no sense together."""

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """The flags with other values, also of fixed ones."""
        other = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        other._check_values()
        other.check()
        return other

    def is_as(self, other: Flags, names: Iterable[str]) -> bool:
        """Whether these flags have the same values in both."""
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def _check_values(self):
        for name, kind in kinds(type(self)).items():
            value, allowed = getattr(self, name), about(type(self), name)
            if value is None and not kind.optional:
                raise UserError(f"--{name}: it needs a value")
            if name == "workdir" and value is None:
                value = "runs"
            items = value if isinstance(value, tuple) else (value,)
            if allowed.get("each_once") and (not items or len({*items}) < len(items)):
                raise UserError(f"--{name}={listed(items)}: name one or more, each once")
            for item in items:
                if item is not None:
                    _check_item(name, item, allowed)


def _check_item(name: str, item: Any, allowed: Mapping[str, Any]) -> None:
    shown = f"--{name}={item}"
    if name in PATHS and item and isinstance(item, str):
        expanded(item, f"--{name}")
    if isinstance(item, float) and not abs(item) <= LARGEST:
        raise UserError(f"{shown}: it must be finite, at most {LARGEST}")
    if isinstance(item, int) and not abs(item) <= MOST:
        raise UserError(f"{shown}: it must be at most {MOST}, as JAX counts")
    if "choices" in allowed and item not in allowed["choices"]:
        raise UserError(f"{shown}: choose from {', '.join(map(str, allowed['choices']))}")
    if isinstance(item, int | float):
        number = item if abs(item) >= SMALLEST else 0  # as float32 has it
        limits = {word: allowed[word] for word in LIMITS if word in allowed}
        if not all(LIMITS[word](number, limit) for word, limit in limits.items()):
            span = " and ".join(f"{w.replace('_', ' ')} {n}" for w, n in limits.items())
            raise UserError(f"{shown}: it must be {span}")


def check_known(name: str, values: Iterable[str], known: Iterable[str]) -> None:
    """Raises a UserError for a value of the flag that is not among those that are known."""
    for value in values:
        if value not in known:
            raise UserError(f"--{name}: unknown {value!r}, choose from {', '.join(known)}")


def listed(values: Any) -> str:
    """As one writes them on the command line."""
    return ",".join(map(str, values))
