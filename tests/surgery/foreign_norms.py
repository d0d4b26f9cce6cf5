"""BatchNorms as projects write their own, in Linen and NNX, each with its Adapter."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from models import drawn

from bn_jax.surgery import Adapter

X = jnp.asarray(np.random.default_rng(0).normal(5, 3, (8, 3)), jnp.float32)


def normalized(x, mean, var, eps, scale):
    return (x - mean[None]) / jnp.sqrt(var[None] + eps) * scale[None]


class OwnNorm(nn.Module):
    """Its mode is a positional argument, its settings are constants but epsilon."""

    eps: float = 1e-3

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        m, v = (x.mean(0), x.var(0)) if train else (mean.value, var.value)
        if train and not self.is_initializing():
            mean.value, var.value = 0.7 * mean.value + 0.3 * m, 0.7 * var.value + 0.3 * v
        return normalized(x, m, v, self.eps, scale)


class TorchLike(nn.Module):
    """torch's names and its momentum, and `train` as a field or an argument."""

    train: bool | None = None
    momentum: float = 0.3
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x, *, train=None):
        train = nn.merge_param("train", self.train, train)
        mean = self.variable("batch_stats", "running_mean", jnp.zeros, x.shape[-1])
        var = self.variable("batch_stats", "running_var", jnp.ones, x.shape[-1])
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        m, v = (x.mean(0), x.var(0)) if train else (mean.value, var.value)
        if train and not self.is_initializing():
            mean.value += self.momentum * (m - mean.value)
            var.value += self.momentum * (v - var.value)
        return normalized(x, m, v, self.eps, weight)


class CopyOfFlax(nn.Module):
    """Flax's fields and names, copied."""

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.7
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x, use_running_average=None):
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        m, v = (mean.value, var.value) if inference else (x.mean(0), x.var(0))
        if not inference and not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * m
            var.value = self.momentum * var.value + (1 - self.momentum) * v
        return normalized(x, m, v, self.epsilon, scale)


class NnxOwn(nnx.Module):
    """Its mode is an attribute that `train()` and `eval()` set."""

    def __init__(self, features: int):
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.gamma, self.deterministic = nnx.Param(jnp.ones(features)), False

    def __call__(self, x):
        m, v = x.mean(0), x.var(0)
        if self.deterministic:
            m, v = self.mean[...], self.var[...]
        else:
            self.mean[...] = 0.7 * self.mean[...] + 0.3 * m
            self.var[...] = 0.7 * self.var[...] + 0.3 * v
        return normalized(x, m, v, 1e-3, self.gamma[...])


class OwnNet(nn.Module):
    """One of these layers, told its mode by position, by name, or in the constructor."""

    norm: Any
    how: str = "position"

    @nn.compact
    def __call__(self, x, train):
        if self.how == "position":
            return self.norm(name="norm")(x, train)
        if self.how == "name":
            return self.norm(name="norm")(x=x, train=train)
        if self.how == "field":
            return self.norm(name="norm", train=train)(x)
        return self.norm(name="norm")(x, not train)


class NnxNet(nnx.Module):
    def __init__(self):
        self.norm = NnxOwn(3)

    def __call__(self, x):
        return self.norm(x)


def linen(norm, how):
    model = OwnNet(norm, how)
    shapes = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), X)
    return model, drawn(shapes), {"train": True}


def of_nnx():
    return *nnx.split(NnxNet()), {}


OWN = {OwnNorm: Adapter("train", True, axis=-1, epsilon="eps", momentum=0.7)}
TORCH = {
    TorchLike: Adapter(
        "train", True, axis=-1, epsilon="eps", momentum=lambda layer: 1 - layer.momentum,
        mean="running_mean", var="running_var", scale="weight",
    )
}  # fmt: skip
NNX = {NnxOwn: Adapter("deterministic", axis=1, epsilon=1e-3, momentum=0.7, scale="gamma")}
FLAX = {CopyOfFlax: Adapter()}
# A function to the model, its variables and its call in training; and the adapters.
NORMS = {
    "by position": (functools.partial(linen, OwnNorm, "position"), OWN),
    "by name": (functools.partial(linen, TorchLike, "name"), TORCH),
    "field": (functools.partial(linen, TorchLike, "field"), TORCH),
    "copy of Flax's": (functools.partial(linen, CopyOfFlax, "inverse"), FLAX),
    "nnx": (of_nnx, NNX),
}
