"""Which layer feeds which, read off the program that a model is on a sample.

The inputs and outputs of its linear layers and BatchNorms, and the variables that they read,
are marked while the model is traced, and the marks looked for in the program (a jaxpr):
neither names nor the order of definition matter, and an operation in between or a second use
is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bn_jax.surgery.calls import KNOWN, BatchNorms, Call, Path, spelled
from bn_jax.surgery.compare import array_leaves, arrays_among
from bn_jax.surgery.intercept import Model, Run, Variables, apply_and_update, intercept
from bn_jax.surgery.kernels import LINEAR
from bn_jax.surgery.program import MARK, Op, Program, bits, narrows
from bn_jax.surgery.tree import COLLECTIONS, flat, layer_places


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
      held: of each layer whose variables no other values can replace, why: it computes with
        values that are made from them, or they are read elsewhere too.
      strangers: the classes of other layers that have running statistics.
      exact: whether all is computed in float64 that depends on variables and inputs.
    """

    calls: dict[Path, Call]
    outputs: dict[Path, jax.ShapeDtypeStruct]
    before: dict[Path, Path | str]
    after: dict[Path, Path | str]
    held: dict[Path, str]
    strangers: dict[Path, type]
    exact: bool


def trace(
    model: Model,
    variables: Variables,
    *inputs: Any,
    norms: BatchNorms = KNOWN,
    run: Run = apply_and_update,
    **call: Any,
) -> Flow:
    """The flow of a model in one call.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs, **call: what the model is called with; of the inputs only shapes matter.
      norms: classes of BatchNorms.
      run: how the model is called.
    """
    calls: list[Call] = []
    outputs: dict[Path, jax.ShapeDtypeStruct] = {}

    def hook(layer_call):
        number = len(calls)
        shape = jax.ShapeDtypeStruct(layer_call.x.shape, layer_call.x.dtype)
        calls.append(layer_call.replace_x(shape))
        for name, v in _variables(layer_call.layer).items():
            checkpoint_name(v, f"{MARK} read {number} {name}")
        x = checkpoint_name(layer_call.x, f"{MARK} in {number}")
        y = layer_call.replace_x(x).proceed()
        outputs[layer_call.path] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return checkpoint_name(y, f"{MARK} out {number}")

    strangers: dict[Path, type] = {}
    marked = intercept(model, variables, hook, norms, LINEAR, strangers.__setitem__)

    arrays, replaced = arrays_among(inputs)

    def function(variables, arrays):
        # With what it writes into its variables: they are consumers too.
        output, written = run(marked, variables, *replaced(arrays), **call)
        return array_leaves(output), written

    jaxpr, (returned, _) = jax.make_jaxpr(function, return_shape=True)(variables, arrays)
    program = Program(jaxpr.jaxpr, len(returned))
    wide = all(bits(v.aval) in (0, 64) for v in jaxpr.jaxpr.invars)
    reader = _Reader(calls, outputs, program, _places(model, variables))
    return reader.flow(strangers, exact=wide and not narrows(jaxpr.jaxpr))


def _places(model, variables):
    """Where among the leaves of the variables those of each layer are, by their names."""
    leaves, structure = jax.tree.flatten(variables)
    numbered = flat(jax.tree.unflatten(structure, range(len(leaves))))
    return {
        path: {name: jax.tree.leaves(numbered[place])[0] for name, place in names.items()}
        for path, names in layer_places(model, variables, nnx.Variable).items()
    }


def _variables(layer):
    """The arrays of a layer by name, as it reads them in this call."""
    if isinstance(layer, nn.Module):
        collections = (layer.variables.get(c, {}) for c in COLLECTIONS)
        stored = {
            name: v for c in collections for name, v in c.items() if not isinstance(v, Mapping)
        }
    else:
        stored = {n: v for n, v in vars(layer).items() if isinstance(v, nnx.Variable)}
    # Without unboxing, which may constrain how an array is sharded.
    leaves = {name: jax.tree.leaves(v) for name, v in stored.items()}
    return {name: v[0] for name, v in leaves.items() if len(v) == 1}


class _Reader:
    """What the marks in a program say of a model's layers."""

    def __init__(self, calls: list[Call], outputs, program: Program, places):
        self.calls, self.outputs, self.program, self.places = calls, outputs, program, places
        self.times = Counter(call.path for call in calls)
        self.number = {call.path: n for n, call in enumerate(calls)}

    def flow(self, strangers: dict[Path, type], exact: bool) -> Flow:
        """All of it."""
        norms = [p for p, n in self.number.items() if self.calls[n].adapter is not None]
        held = {p: self.held(p) for p in self.number if not self.problem(p)}
        return Flow(
            {p: self.calls[n] for p, n in self.number.items()},
            self.outputs,
            {p: self.problem(p) or self.before(p) for p in norms},
            {p: self.problem(p) or self.after(p) for p in norms},
            {p: reason for p, reason in held.items() if reason},
            strangers,
            exact,
        )

    def said(self, op: Op) -> str:
        """An operation, in words."""
        return op.name if op.mark < 0 else spelled(self.calls[op.mark].path)

    def problem(self, path: Path) -> str | None:
        """Why the program does not say once and for all what the layer does, if so."""
        if self.times[path] > 1:
            return f"{spelled(path)} is called {self.times[path]} times"
        if self.number[path] not in self.program.taken:
            return f"{spelled(path)} is in a loop or a branch"
        if self.program.times[self.number[path]] > 1:
            return f"{spelled(path)} is in a function that is called several times"
        return None

    def before(self, path: Path) -> Path | str:
        """See `Flow`."""
        value, own = self.program.taken[self.number[path]], Op("in", self.number[path])
        others = [use.op for use in self.program.users[value] if use.op != own]
        if others:
            return f"what it takes goes to {', '.join(map(self.said, others))} too"
        op = self.program.producer[value]
        if not self.is_linear(op, "out"):
            return f"its input comes from {self.said(op)}"
        layer = self.calls[op.mark].path
        return self.problem(layer) or self.mapped(layer, path) or layer

    def after(self, path: Path) -> Path | str:
        """See `Flow`."""
        ops = [use.op for use in self.program.users[self.program.given[self.number[path]]]]
        if len(ops) != 1 or not self.is_linear(ops[0], "in"):
            return f"its output goes to {', '.join(map(self.said, ops)) or 'nothing'}"
        layer = self.calls[ops[0].mark].path
        return self.problem(layer) or self.mapped(path, layer) or layer

    def is_linear(self, op: Op, role: str) -> bool:
        """Whether an operation is this mark of a linear layer."""
        return op.name == role and self.calls[op.mark].adapter is None

    def mapped(self, first: Path, second: Path) -> str | None:
        """Why the axes of two layers may not be the same, if so."""
        if self.outputs[first].shape != self.calls[self.number[second]].x.shape:
            return f"{spelled(first)} or {spelled(second)} is in a vmap"
        return None

    def held(self, path: Path) -> str | None:
        """See `Flow`."""
        n = self.number[path]
        for name, value in self.program.read.get(n, {}).items():
            if value != self.program.inputs[self.places[path][name]]:
                source = self.said(self.program.producer[value])
                return f"computes with a {name} that comes from {source}"
            if elsewhere := self.program.uses_beside(value, Op("out", n)):
                others = ", ".join(map(self.said, elsewhere))
                return f"has a {name} that {others} takes too: give it one of its own"
        return None
