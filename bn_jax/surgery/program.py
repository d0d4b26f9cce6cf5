"""Who makes and who uses the values of a program, a jaxpr in which layers are marked."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

MARK = "bn_jax.surgery.flow"
# What returns its operands as they are.
IDENTITIES = ("copy", "copy_p", "name", "optimization_barrier", "stop_gradient")


class Op(NamedTuple):
    """An operation by name; or "in", "out" or "read", a mark of a call by its number."""

    name: str
    mark: int = -1


class Use(NamedTuple):
    """An operation that takes a value, and the values that it gives."""

    op: Op
    given: list[int]


class Program:
    """Who makes and who uses the values of a jaxpr.

    What is called once, with all of its operands, is read as if it were written out; what
    is in a loop or a branch is not read at all.

    Attributes:
      inputs: the values that it takes, by their numbers.
      producer: of every value, by its number, the operation.
      users: of every value, what takes it.
      taken, given: the value that goes into the mark "in", and comes out of the mark "out",
        of each call.
      read: of each call the values that it reads as its variables, by their names.
      times: how often the mark "in" was met; more than once in a function that was traced
        once and is called several times.
    """

    def __init__(self, jaxpr: core.Jaxpr, outputs: int):
        """Of a jaxpr that returns so many outputs, and then variables."""
        self.producer = defaultdict(lambda: Op("the model's input"))
        self.users: dict[int, list[Use]] = defaultdict(list)
        self.taken: dict[int, int] = {}
        self.given: dict[int, int] = {}
        self.read: dict[int, dict[str, int]] = defaultdict(dict)
        self.times: Counter[int] = Counter()
        self._numbers = itertools.count()
        self.inputs = [next(self._numbers) for _ in jaxpr.invars]
        for i, value in enumerate(self._read(jaxpr, self.inputs, None)):
            # That a variable is left as it is is no use of it.
            if i < outputs or value not in self.inputs:
                name = "the model's output" if i < outputs else "a variable that it writes"
                self.users[value].append(Use(Op(name), []))

    def uses_beside(self, value: int, own: Op) -> list[Op]:
        """The marks and outputs that a value reaches by other ways than through `own`."""
        found, seen, ahead = {}, {value}, [value]
        while ahead:
            for op, given in self.users[ahead.pop()]:
                if op.name == "read" or op == own:
                    continue
                if op.mark >= 0 or not given:
                    found[op] = None
                    continue
                ahead += set(given) - seen
                seen |= set(given)
        return list(found)

    def _read(self, jaxpr, inputs, within):
        """Reads the equations; the values that go in and come out are numbers.

        Not variables: two calls of one function may share a jaxpr.
        """
        values = dict(zip(jaxpr.invars, inputs, strict=True))

        def value(v):
            # Literals and constants are new each time: nobody asks where they come from.
            new = isinstance(v, core.Literal) or v not in values
            return next(self._numbers) if new else values[v]

        for eqn in jaxpr.eqns:
            taken = [value(v) for v in eqn.invars]
            inner = _written_out(eqn)
            if inner is None:
                given = self._add(eqn, taken, within)
            else:
                layers = any(e.primitive.name == "name" for e in inner.eqns)
                given = self._read(inner, taken, None if layers else eqn.params.get("name"))
            values.update(zip(eqn.outvars, given, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def _add(self, eqn, taken, within):
        marked = eqn.primitive.name == "name" and eqn.params["name"].startswith(MARK)
        if eqn.primitive.name in IDENTITIES and not marked:
            return taken
        given = [next(self._numbers) for _ in eqn.outvars]
        op = Op((within or eqn.primitive.name).strip("_"))
        if marked:
            role, number, *name = eqn.params["name"].removeprefix(MARK).split()
            op = Op(role, int(number))
            if role == "in":
                self.taken[op.mark] = taken[0]
                self.times[op.mark] += 1
            elif role == "out":
                self.given[op.mark] = given[0]
            else:
                self.read[op.mark][" ".join(name)] = taken[0]
        for v in taken:
            self.users[v].append(Use(op, given))
        for v in given:
            self.producer[v] = op
        return given


def narrows(jaxpr: core.Jaxpr) -> bool:
    """Whether a program rounds float64 to less, in its loops and branches too.

    What it makes of nothing but constants may be of any dtype.
    """
    for eqn in jaxpr.eqns:
        wide = any(bits(v.aval) == 64 for v in eqn.invars)
        if wide and any(0 < bits(v.aval) < 64 for v in eqn.outvars):
            return True
        parameters = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        inner = (getattr(p, "jaxpr", p) for p in parameters if _is_jaxpr(p))
        if any(map(narrows, inner)):
            return True
    return False


def bits(aval: Any) -> int:
    """Of a real floating-point number, or of a part of a complex one; 0 of others."""
    dtype = getattr(aval, "dtype", None)
    return jnp.finfo(dtype).bits if dtype and jnp.issubdtype(dtype, jnp.inexact) else 0


def _is_jaxpr(v):
    return isinstance(v, core.Jaxpr | core.ClosedJaxpr)


def _written_out(eqn):
    """The program of an operation that runs it once with its own operands, or None."""
    if eqn.primitive.name in ("scan", "while", "cond", "pmap"):
        return None
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    fits = inner is not None and len(inner.invars) == len(eqn.invars)
    return inner if inner and fits and len(inner.outvars) == len(eqn.outvars) else None
