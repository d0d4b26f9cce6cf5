"""What a training step of a network sends: read off the network, nothing is computed."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

FLOAT = 4  # bytes


class Network(NamedTuple):
    """Parameters, the features of each BatchNorm, FLOP of a training step per example."""

    name: str
    parameters: int
    features: tuple[int, ...]
    flop: float

    def gradients(self) -> int:
        """Bytes of the gradients' all-reduce."""
        return FLOAT * self.parameters

    def norms(self) -> list[int]:
        """Bytes of every all-reduce of the BatchNorms: of C + 1, C and 2 C numbers each."""
        return [FLOAT * count for c in self.features for count in (c + 1, c, 2 * c)]

    def running(self, chips: int) -> int:
        """Bytes by which all of so many chips know the statistics of every group.

        A slot of 2 C + 1 numbers for each chip, of which none has several groups: what a
        `GhostBatchNorm` sends for its running statistics.
        """
        return FLOAT * chips * sum(2 * c + 1 for c in self.features)


def describe(name: str, model: nn.Module, image: tuple[int, ...]) -> Network:
    """The network of a model of images `[height, width, channels]`."""
    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    statistics = traverse_util.flatten_dict(variables["batch_stats"])
    return Network(
        name,
        sum(v.size for v in jax.tree.leaves(variables["params"])),
        tuple(v.size for path, v in statistics.items() if path[-1] == "mean"),
        _flop(model, variables, images),
    )


def _flop(model, variables, images):
    def loss(params, rest, images):
        outputs, _ = model.apply(
            {"params": params, **rest}, images, train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )  # fmt: skip
        return outputs.sum()

    rest = {k: v for k, v in variables.items() if k != "params"}
    lowered = jax.jit(jax.grad(loss)).lower(variables["params"], rest, images)
    return lowered.cost_analysis()["flops"] / images.shape[0]
