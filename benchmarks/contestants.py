"""BatchNorm layers of bn_jax, Flax and torch, ready to be timed at one task each."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend.core import Var

from bn_jax.linen import BatchNorm

MOMENTUM = 0.99
Apply = Callable[[dict, dict, jax.Array], tuple[jax.Array, dict]]


class Task(NamedTuple):
    """What is timed, and how many passes over the array it takes at the least.

    Forward: read for the statistics, read, write. Backward: x and dy read for the sums, x
    and dy read, dx written.
    """

    name: str
    passes: int
    backward: bool = True
    relu: bool = False
    masked: bool = False


FORWARD = Task("forward", 3, backward=False)
BOTH = Task("forward+backward", 8)
BOTH_WITH_RELU = Task("BN+ReLU fwd+bwd", 8, relu=True)
MASKED = Task("masked fwd+bwd", 8, masked=True)
TASKS = (FORWARD, BOTH, BOTH_WITH_RELU, MASKED)


class Contestant(NamedTuple):
    """`call()` does the task; bytes of the compiled program and of the residuals, if known.

    `allocated` is temporary and output memory, `kept` what reverse mode keeps of the forward
    pass beside its arguments.
    """

    call: Callable[[], Any]
    allocated: int | None = None
    kept: int | None = None


def prepare(task: Task, x: jax.Array, dy: jax.Array) -> dict[str, Contestant]:
    """By name: the copy, the layers of JAX, compiled, and torch's on a CPU, without masks."""
    one = jnp.ones((), x.dtype)  # traced: XLA would know what to do with a constant 0
    contestants = {"copy": Contestant(functools.partial(jax.jit(jnp.add), x, one))}
    for name, apply in layers(task, x.dtype).items():
        contestants[name] = compiled(task, apply, *initial(x.shape[-1]), x, dy)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and not task.masked and importlib.util.find_spec("torch"):
        contestants["torch"] = Contestant(torch_layer(task, x, dy))
    return contestants


def initial(features: int) -> tuple[dict, dict]:
    """Parameters and running statistics, float32."""
    zeros, ones = jnp.zeros(features), jnp.ones(features)
    return {"scale": ones, "bias": zeros}, {"mean": zeros, "var": ones}


def layers(task: Task, dtype: Any) -> dict[str, Apply]:
    """(params, stats, x) -> (y, new stats) of each layer of JAX, by name."""
    fields = {"use_running_average": False, "momentum": MOMENTUM, "dtype": dtype}
    relu = nn.relu if task.relu else None

    def applied(module, activation=None):
        def apply(params, stats, x):
            variables = {"params": params, "batch_stats": stats}
            mask = {}
            if task.masked:  # every fourth place is left out
                places = jnp.arange(math.prod(x.shape[:-1])) % 4 < 3
                mask = {"mask": places.reshape(*x.shape[:-1], 1)}
            y, new = module.apply(variables, x, **mask, mutable=["batch_stats"])
            return activation(y) if activation else y, new["batch_stats"]

        return apply

    return {
        "bn_jax": applied(BatchNorm(**fields, activation=relu)),
        "flax fast": applied(nn.BatchNorm(**fields), relu),
        "flax stable": applied(nn.BatchNorm(**fields, use_fast_variance=False), relu),
    }


def compiled(task: Task, apply: Apply, params, stats, x, dy) -> Contestant:
    """Its call gives (y, new stats), or (y, (dparams, dx), new stats)."""
    arguments = (params, stats, x, dy) if task.backward else (params, stats, x)
    f = functools.partial(forward_backward, apply) if task.backward else apply
    program = jax.jit(f).lower(*arguments).compile()
    memory = program.memory_analysis()
    return Contestant(
        functools.partial(program, *arguments),
        memory.temp_size_in_bytes + memory.output_size_in_bytes,
        kept_bytes(apply, params, stats, x) if task.backward else None,
    )


def forward_backward(apply: Apply, params, stats, x, dy):
    """y, the gradients of the parameters and of x for dy, and the new statistics."""
    y, vjp, stats = _vjp(apply, params, stats, x)
    return y, vjp(dy), stats


def kept_bytes(apply: Apply, params, stats, x) -> int:
    """Bytes that the backward pass needs of the forward pass: no arguments, no constants."""

    def residuals(params, stats, x):
        return jax.tree.leaves(_vjp(apply, params, stats, x)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, stats, x).jaxpr
    outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}
    kept = {
        v
        for equation in jaxpr.eqns
        if any(isinstance(operand, Var) for operand in equation.invars)
        for v in outputs.intersection(equation.outvars)
    }
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)


def _vjp(apply, params, stats, x):
    return jax.vjp(lambda params, x: apply(params, stats, x), params, x, has_aux=True)


def torch_layer(task: Task, x: jax.Array, dy: jax.Array) -> Callable[[], Any]:
    """Its call gives y, or (y, (dscale, dbias, dx)).

    The arrays lie in memory as JAX's do, features last: torch's `channels_last`.
    """
    # Threads that spin for 5 ms when torch is done would slow down the next contestant.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    def tensor(v):
        v32 = torch.from_numpy(np.array(v, np.float32))
        return v32.to(getattr(torch, v.dtype.name)).movedim(-1, 1)

    features = x.shape[-1]
    x, dy = tensor(x), tensor(dy)
    mean, bias = torch.zeros(features), torch.zeros(features)
    var, scale = torch.ones(features), torch.ones(features)
    for v in (scale, bias, x):
        v.requires_grad_(task.backward)

    def forward():
        y = torch.nn.functional.batch_norm(
            x, mean, var, scale, bias, training=True, momentum=1 - MOMENTUM
        )
        return torch.relu(y) if task.relu else y

    def both():
        y = forward()
        return y, torch.autograd.grad(y, (scale, bias, x), dy)

    return both if task.backward else forward
