"""Models as other people write them, and chains of layers, in Linen and in NNX alike."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bn_jax.linen
import bn_jax.nnx

Module = Any
BOTH_NORMS = {"ours": (bn_jax.linen, bn_jax.nnx), "flax": (nn, nnx)}


class BasicBlock(nn.Module):
    """He et al. 2015, figure 5, left: two 3x3 convolutions."""

    filters: int
    conv: Module
    norm: Module
    act: Callable
    strides: int = 1
    expansion = 1

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.filters, (3, 3), self.strides)(x)
        y = self.act(self.norm()(y))
        y = self.conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        return self.act(self.shortcut(x, y.shape) + y)

    def shortcut(self, x, shape):
        if x.shape == shape:
            return x
        x = self.conv(shape[-1], (1, 1), self.strides, name="conv_proj")(x)
        return self.norm(name="norm_proj")(x)


class BottleneckBlock(BasicBlock):
    """Figure 5, right: 1x1, 3x3 and 1x1, the last four times as wide."""

    expansion = 4

    @nn.compact
    def __call__(self, x):
        y = self.act(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.conv(self.expansion * self.filters, (1, 1))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        return self.act(self.shortcut(x, y.shape) + y)


class ResNet(nn.Module):
    """As Flax's ImageNet example has it: `conv` and `norm` are partials, made in the call."""

    stage_sizes: Sequence[int]
    block: Module
    num_classes: int = 5
    filters: int = 4
    norm: Module = nn.BatchNorm
    act: Callable = nn.relu

    @nn.compact
    def __call__(self, x, train=True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            self.norm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        x = conv(self.filters, (7, 7), (2, 2), padding=[(3, 3)] * 2, name="conv_init")(x)
        x = self.act(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, size in enumerate(self.stage_sizes):
            for j in range(size):
                strides = 2 if i > 0 and j == 0 else 1
                x = self.block(self.filters * 2**i, conv, norm, self.act, strides)(x)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


class NnxBlock(nnx.Module):
    """A basic block."""

    def __init__(self, inputs, filters, strides, norm, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1 = conv(inputs, filters, (3, 3), strides)
        self.norm1 = norm(filters, rngs=rngs)
        self.conv2, self.norm2 = conv(filters, filters, (3, 3)), norm(filters, rngs=rngs)
        self.shortcut = nnx.data(None)
        if inputs != filters or strides != 1:
            proj = conv(inputs, filters, (1, 1), strides)
            self.shortcut = nnx.Sequential(proj, norm(filters, rngs=rngs))

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu((x if self.shortcut is None else self.shortcut(x)) + y)


class NnxResNet(nnx.Module):
    """The same of basic blocks in NNX; `eval()` puts it into inference mode."""

    def __init__(self, stage_sizes, norm, rngs, num_classes=5, filters=4):
        stem = nnx.Conv(3, filters, (7, 7), 2, padding=3, use_bias=False, rngs=rngs)
        self.stem = nnx.Sequential(stem, norm(filters, rngs=rngs), nnx.relu)
        self.blocks, width = nnx.List([]), filters
        for i, size in enumerate(stage_sizes):
            for j in range(size):
                strides = 2 if i > 0 and j == 0 else 1
                self.blocks.append(NnxBlock(width, filters * 2**i, strides, norm, rngs))
                width = filters * 2**i
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(self.stem(x), (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


class Layer(NamedTuple):
    """A layer by the name of its Linen class, or a function in place of the name."""

    kind: str | Callable
    args: tuple = ()
    fields: dict = {}  # noqa: RUF012

    def linen(self, norms="ours"):
        if callable(self.kind):
            return self.kind
        home = BOTH_NORMS[norms][0] if self.kind == "BatchNorm" else nn
        return getattr(home, self.kind)(*self.args, **self.fields)

    def nnx(self, x, norms="ours"):
        """With the sizes of its input, which NNX wants to know."""
        if callable(self.kind):
            return self.kind
        names = {"Dense": "Linear", "DenseGeneral": "LinearGeneral"}
        axis = self.fields.get("axis", -1)
        axes = axis if isinstance(axis, tuple) else (axis,)
        sizes = tuple(x.shape[a] for a in (sorted(axes) if self.kind == "BatchNorm" else axes))
        home = BOTH_NORMS[norms][1] if self.kind == "BatchNorm" else nnx
        layer = getattr(home, names.get(self.kind, self.kind))
        first = sizes if len(sizes) > 1 else sizes[0]
        return layer(first, *self.args, **self.fields, rngs=nnx.Rngs(0))


def norm(**fields):
    return Layer("BatchNorm", (), {"use_running_average": True} | fields)


def chain(home, x, *layers, norms="ours"):
    """The layers one after another: a model, its variables, the path of each."""
    if home == "linen":
        paths = [(f"layers_{i}",) for i in range(len(layers))]
        model = nn.Sequential([layer.linen(norms) for layer in layers])
        return *with_variables(model, x), paths

    def build():
        made, shape = [], jax.typeof(x)
        for layer in layers:
            made.append(layer.nnx(shape, norms))
            shape = _output_shape(layer, shape)
        return nnx.Sequential(*made)

    return *with_variables(build), [("layers", i) for i in range(len(layers))]


def _output_shape(layer, x):
    if callable(layer.kind):
        return jax.eval_shape(layer.kind, x)
    return jax.eval_shape(layer.linen().init_with_output, jax.random.key(0), x)[0]


def with_variables(model, *inputs, **call):
    """A model and variables that are not those of its initialisers, which do not run.

    An NNX model comes as a function without arguments.
    """
    if isinstance(model, nn.Module):
        init = functools.partial(model.init, **call)
        return model, drawn(jax.eval_shape(init, jax.random.key(0), *inputs))
    graphdef, state = nnx.split(nnx.eval_shape(model))
    return graphdef, drawn(state)


def drawn(shapes):
    """Floating-point values at random, those of variances and scales positive; zeros else."""
    rng = np.random.default_rng(7)

    def one(path, v):
        if not jnp.issubdtype(v.dtype, jnp.inexact):
            return jnp.zeros(v.shape, v.dtype)
        value = rng.normal(size=v.shape) * 0.5
        positive = {"var", "scale"} & {getattr(p, "key", None) for p in path}
        return jnp.asarray(0.2 + np.abs(value) if positive else value, v.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def compact(function):
    """A Linen model out of what it does; layers are made in the call."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, *inputs, **call):
            return function(*inputs, **call)

    return Model()


def in_nnx(layers, function):
    """An NNX model out of its layers, made without arguments, and of what it does."""

    class Model(nnx.Module):
        def __init__(self):
            for name, layer in layers().items():
                setattr(self, name, layer)

        def __call__(self, *inputs):
            return function(self, *inputs)

    return Model


def two_layers():
    """Two linear layers, a and b, and two BatchNorms at inference, n and m, by name."""
    rngs = nnx.Rngs(0)
    norms = functools.partial(bn_jax.nnx.BatchNorm, 4, use_running_average=True, rngs=rngs)
    dense = functools.partial(nnx.Linear, 4, 4, rngs=rngs)
    return {"a": dense(), "b": dense(), "n": norms(), "m": norms()}


def output(model, variables, *inputs, **call):
    """What the model returns."""
    if not isinstance(model, nnx.GraphDef):
        return model.apply(variables, *inputs, **call)
    return nnx.merge(model, variables, copy=True)(*inputs, **call)
