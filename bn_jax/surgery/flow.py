"""Which layer feeds which, read off the program that a model is on a sample.

The inputs and outputs of its linear layers and BatchNorms are marked while the model is
traced, and the marks looked for in the program (a jaxpr): neither names nor the order of
definition matter, and an operation in between or a second use is seen.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from bn_jax.surgery.intercept import (
    BATCH_NORMS,
    Call,
    Model,
    Path,
    apply_and_update,
    intercept,
    spelled,
)
from bn_jax.surgery.kernels import LINEAR

MARK = "bn_jax.surgery.flow"


class Flow(NamedTuple):
    """The linear layers and BatchNorms of a model, and what is next to each BatchNorm.

    Attributes:
      calls: the last call of each, in the order of first calls; `call.x` is a
        ShapeDtypeStruct.
      outputs: of each a ShapeDtypeStruct.
      before: of each BatchNorm the linear layer whose output it takes as it is and nothing
        else takes; or why there is none.
      after: of each BatchNorm the linear layer that takes its output as it is and is the
        only one to; or why there is none.
    """

    calls: dict[Path, Call]
    outputs: dict[Path, jax.ShapeDtypeStruct]
    before: dict[Path, Path | str]
    after: dict[Path, Path | str]


def trace(model: Model, variables: Any, *inputs: Any, **call: Any) -> Flow:
    """The flow of a model in one call.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with; of the inputs only shapes matter.
    """
    calls: list[Call] = []
    outputs: dict[Path, jax.ShapeDtypeStruct] = {}

    def hook(layer_call):
        number = len(calls)
        shape = jax.ShapeDtypeStruct(layer_call.x.shape, layer_call.x.dtype)
        calls.append(layer_call.replace_x(shape))
        x = checkpoint_name(layer_call.x, f"{MARK} in {number}")
        y = layer_call.replace_x(x).proceed()
        outputs[layer_call.path] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return checkpoint_name(y, f"{MARK} out {number}")

    marked = intercept(model, variables, hook, LINEAR + BATCH_NORMS)

    def function(variables, inputs):
        # With what it writes into its variables: they are consumers too.
        return apply_and_update(marked, variables, *inputs, **call)

    program = _Program(jax.make_jaxpr(function)(variables, inputs).jaxpr)
    return _flow(calls, outputs, program)


def _flow(calls: list[Call], outputs: dict, program: _Program) -> Flow:
    times = Counter(call.path for call in calls)
    number = {call.path: n for n, call in enumerate(calls)}
    norms = [p for p, n in number.items() if isinstance(calls[n].layer, BATCH_NORMS)]

    def said(op):
        return op.name if op.mark is None else spelled(calls[op.mark].path)

    def followed(op, role):
        """The path of the linear layer that an operation is the mark of, or the reason."""
        where = {"out": "its input comes from", "in": "its output goes to"}[role]
        if op.name != role or not isinstance(calls[op.mark].layer, LINEAR):
            return f"{where} {said(op)}"
        return problem(calls[op.mark].path) or calls[op.mark].path

    def problem(path):
        if times[path] > 1:
            return f"{spelled(path)} is called {times[path]} times"
        if number[path] not in program.taken:
            return f"{spelled(path)} is in a loop or a branch"
        if program.times[number[path]] > 1:
            return f"{spelled(path)} is in a function that is called several times"
        return None

    def unmapped(first, second):
        """Why the axes of two layers may not be the same, if so."""
        if outputs[first].shape != calls[number[second]].x.shape:
            return f"{spelled(first)} or {spelled(second)} is in a vmap"
        return None

    def before(path):
        value = program.taken[number[path]]
        others = [op for op in program.users[value] if op != _Op("in", number[path])]
        if others:
            return f"what it takes goes to {', '.join(map(said, others))} too"
        linear = followed(program.producer[value], "out")
        return linear if isinstance(linear, str) else unmapped(linear, path) or linear

    def after(path):
        ops = program.users[program.given[number[path]]]
        if len(ops) != 1:
            return f"its output goes to {', '.join(map(said, ops)) or 'nothing'}"
        linear = followed(ops[0], "in")
        return linear if isinstance(linear, str) else unmapped(path, linear) or linear

    return Flow(
        {p: calls[n] for p, n in number.items()},
        outputs,
        {p: problem(p) or before(p) for p in norms},
        {p: problem(p) or after(p) for p in norms},
    )


class _Op(NamedTuple):
    """An operation by name; or "in" or "out", the mark of a call by its number."""

    name: str
    mark: int | None = None


class _Program:
    """Who makes and who uses the values of a jaxpr.

    What is called once, with all of its operands, is read as if it were written out; what
    is in a loop or a branch is not read at all.

    Attributes:
      producer: of every value, by its number, the operation.
      users: of every value, the operations.
      taken, given: the value that goes into the mark "in", and comes out of the mark "out",
        of each call.
      times: how often the mark "in" was met; more than once in a function that was traced
        once and is called several times.
    """

    def __init__(self, jaxpr: core.Jaxpr):
        self.producer = defaultdict(lambda: _Op("the model's input"))
        self.users: dict[int, list[_Op]] = defaultdict(list)
        self.taken: dict[int, int] = {}
        self.given: dict[int, int] = {}
        self.times: Counter[int] = Counter()
        self._numbers = itertools.count()
        for value in self._read(jaxpr, [next(self._numbers) for _ in jaxpr.invars], None):
            self.users[value].append(_Op("the model's output"))

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
        given = [next(self._numbers) for _ in eqn.outvars]
        op = _Op((within or eqn.primitive.name).strip("_"))
        if eqn.primitive.name == "name" and eqn.params["name"].startswith(MARK):
            *_, role, number = eqn.params["name"].split()
            op = _Op(role, int(number))
            if role == "in":
                self.taken[op.mark] = taken[0]
                self.times[op.mark] += 1
            else:
                self.given[op.mark] = given[0]
        for v in taken:
            self.users[v].append(op)
        for v in given:
            self.producer[v] = op
        return given


def _written_out(eqn):
    """The program of an operation that runs it once with its own operands, or None."""
    if eqn.primitive.name in ("scan", "while", "cond", "pmap"):
        return None
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    fits = inner is not None and len(inner.invars) == len(eqn.invars)
    return inner if fits and len(inner.outvars) == len(eqn.outvars) else None
