"""What the program of a run tells before it is compiled: its size, and whether it convolves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bn_jax.lab.training.run import Run, Swept

# Two cores trained dense networks of .1 to 34 MB 1.2 to 2.1 times as fast by runs of their own,
# of 60 MB 1.06 times; digits' CNNs of 2 MB 1.5 times, CIFAR-10's network A of 230 MB .98 times
# and of 1,400 MB .77 times.
SHARED = 64 << 20
# A run's own calls cost some .2 ms for an evaluation and the steps before it. Circles has 3 MB
# in between and takes 3.8 times as long by itself; digits with 16 MB .7 times.
CALLS = 8 << 20


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

    def small(self, steps: int) -> bool:
        """Whether a CPU's cores had better train runs of their own, each on one core.

        Operations must be too small to be shared out, and the `steps` between two evaluations
        enough for the calls that every run then needs for itself.
        """
        return self.bytes < SHARED and steps * self.bytes > CALLS

    def calls(self, steps: int) -> int:
        """How many calls that many steps are worth, one at least."""
        return max(1, steps * self.bytes // CALLS)

    @property
    def convolves(self) -> bool:
        """Whether the network has a convolution."""
        return "conv_general_dilated" in str(self.forward)


def traced(run: Run, dataset: Any) -> Traced:
    """What the run is like; nothing is computed."""
    swept = Swept(jnp.float32(1), jnp.float32(1), jnp.float32(0.5))
    key = jax.random.key(0)
    state = jax.eval_shape(run.init, key, swept, dataset.train.inputs)
    rows = jax.eval_shape(lambda key: run.batches(key, jnp.int32(0), 1)[0], key)
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
