"""What the program of a run tells before it is compiled: its size, and whether it convolves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bn_jax.training.run import Run, Swept


class Traced(NamedTuple):
    """The shapes of a run's state and batch, and the program that evaluates one example."""

    state: Any
    rows: jax.ShapeDtypeStruct
    forward: Any

    @property
    def bytes(self) -> int:
        """A rough size of one run in a sweep: its state with gradients, and activations."""
        of_state = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(self.state))
        of_example = sum(_output_bytes(self.forward))
        # State, its successor, gradients and updates. Every intermediate array of the forward
        # pass counts, although some are fused away, as those of the backward pass do not.
        return 4 * of_state + self.rows.size * of_example

    @property
    def convolves(self) -> bool:
        """Whether the network has a convolution."""
        return "conv_general_dilated" in str(self.forward)


def traced(run: Run, dataset: Any) -> Traced:
    """What the run is like; nothing is computed."""
    swept = Swept(jnp.float32(1), jnp.float32(1), jnp.float32(0.5))
    key = jax.random.key(0)
    state = jax.eval_shape(run.init, key, swept, dataset.train.inputs)
    rows = jax.eval_shape(lambda key: run.batches(key, 0, 1)[0], key)
    program = jax.make_jaxpr(run.evaluate)(state, swept, dataset.test, jnp.zeros(1, int))
    return Traced(state, rows, program.jaxpr)


def _output_bytes(program, times=1):
    """Of the results of a program's operations, those of its subprograms included."""
    for equation in program.eqns:
        yield from (times * v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
        # The backward pass of a scan keeps what every turn of it computed.
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _output_bytes(inner, times * turns)
