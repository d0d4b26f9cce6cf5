"""What is wrong with how a layer is trained, and called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.surgery.calls import Path, left_alone, spelled
from bn_jax.surgery.diagnose.findings import Finding
from bn_jax.surgery.diagnose.modes import Mode, proceed_alone
from bn_jax.surgery.diagnose.watch import Norm
from bn_jax.surgery.flow import trace
from bn_jax.surgery.intercept import intercept
from bn_jax.surgery.tree import get_leaves, split

# A schedule may begin with a rate of 0, and updates may be of several batches together.
STEPS = 64


def check_mode(norms: Iterable[Norm]) -> Iterator[Finding]:
    """Layers that normalise by the batch in evaluation."""
    for norm in norms:
        if norm.training:
            meaning = "it normalises by the batch in the evaluation call"
            yield Finding("training_mode_in_evaluation", norm.path, 1, 0, meaning)


def check_classes(strangers: dict[Path, type]) -> Iterator[Finding]:
    """Layers with running statistics that nobody can examine."""
    for path, cls in strangers.items():
        name = f"{cls.__module__}.{cls.__name__}"
        meaning = f"it has running statistics, and {name} is no known class"
        remedy = f"say how to read it: batch_norms={{{cls.__name__}: Adapter(...)}}, or None"
        yield Finding("unknown_layer", path, 1, 0, meaning, remedy)


def check_decay(optimizer: Any, variables: Any, norms: Iterable[Norm]) -> Iterator[Finding]:
    """Scales that the optimizer moves though no gradient does."""
    moved = decayed(optimizer, nnx.as_pure(nn.unbox(split(variables)[0])))
    for norm in norms:
        share = moved.get((*norm.path, norm.adapter.scale), 0.0)
        if share > 0:
            meaning = (
                f"without a gradient the optimizer takes {share:.2g} of the scale in a step"
            )
            yield Finding("decayed_scale", norm.path, share, 0, meaning)


def decayed(optimizer: Any, params: Any) -> dict[Path, float]:
    """Of each parameter, the largest share that a step takes of it with gradients of 0.

    It is what the updates owe to the parameters: those with the parameters, less those with
    zeros in their place, which are noise that the optimizer adds. Of `STEPS` steps.
    """
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(carry, _):
        (state, other), most = carry
        updates, state = optimizer.update(zeros, state, params)
        noise, other = optimizer.update(zeros, other, zeros)
        shares = jax.tree.map(_share, updates, noise, params)
        return ((state, other), jax.tree.map(jnp.maximum, most, shares)), None

    start = optimizer.init(params)
    none = jax.tree.map(lambda _: jnp.float32(0), params)
    (_, most), _ = jax.lax.scan(step, ((start, start), none), length=STEPS)
    paths = jax.tree_util.tree_leaves_with_path(most)
    return {tuple(key.key for key in path): float(v) for path, v in paths}


def check_biases(
    mode: Mode, variables: Any, inputs: tuple, norms: list[Norm]
) -> Iterator[Finding]:
    """Biases that the BatchNorm after them subtracts again, with the mean."""
    model, known = mode.model, mode.norms
    if any(getattr(norm.layer, "axis_name", None) is not None for norm in norms):
        model = intercept(model, variables, proceed_alone, known, stranger=left_alone)
    inputs = mode.of(inputs)
    before = trace(model, variables, *inputs, norms=known, run=mode.run, **mode.call).before
    for norm in norms:
        path = before.get(norm.path, "")
        if isinstance(path, str) or not norm.training:
            continue
        bias = get_leaves(mode.model, variables, path).get("bias")
        if bias is not None:
            meaning = f"{spelled(norm.path)} subtracts its {bias.size} biases with the mean"
            yield Finding("useless_bias", path, bias.size, 0, meaning)


def _share(update, noise, param):
    # Two programs may round the same noise differently.
    apart = jnp.where(jnp.isclose(update, noise, 1e-5, 0), 0, jnp.abs(update - noise))
    largest = jnp.abs(param).max()
    return (apart.max() / jnp.where(largest > 0, largest, 1)).astype(jnp.float32)
