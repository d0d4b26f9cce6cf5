"""What a generated network returns, in float64 NumPy: nothing of it is bn_jax's or Flax's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from generated_nodes import (
    Network,
    Node,
    Path,
    Variables,
    output_shape,
    owners,
    window_pads,
)


class Run(NamedTuple):
    """What one call of a network did.

    Attributes:
      outputs: of the network.
      variables: after the call.
      seen: (path, node, `[elements, features]`) of every call of a BatchNorm.
    """

    outputs: list[np.ndarray]
    variables: Variables
    seen: list[tuple[Path, Node, np.ndarray]]


def run(
    network: Network,
    variables: Variables,
    x: np.ndarray,
    *,
    train: bool = False,
    masks: Mapping[str, np.ndarray] | None = None,
    inference: Collection[Path] = (),
    kept: Collection[Path] = (),
) -> Run:
    """One call.

    Args:
      network: the description.
      variables: by (path, leaf).
      x: the input.
      train: whether BatchNorms normalise by the batch, and move their statistics.
      masks: by what the dropout of each name multiplies, in training.
      inference: paths of layers that use running statistics in training too.
      kept: paths of layers whose running statistics stay.
    """
    state = _State(dict(variables), owners(network), train, masks or {}, inference, kept, [])
    values = state.run(network.nodes, x, ())
    outputs = [values[i] * factor for i, factor in network.outputs]
    return Run(outputs, state.variables, state.seen)


def population(network: Network, runs: list[Run], only: Collection[Path]) -> Variables:
    """Mean and variance of all that each of these layers was given, pooled.

    Of layers that have their statistics in common those of what all of them were given.
    """
    where, rows = owners(network), {}
    for path, _, given in (call for one in runs for call in one.seen):
        if path in only:
            rows.setdefault(where[path, "mean"], []).append(given)
    found = {}
    for path, given in rows.items():
        together = np.concatenate(given)
        found |= {(path, "mean"): together.mean(0), (path, "var"): together.var(0)}
    return found


def moved(
    network: Network, variables: Variables, runs: list[Run], kept: Collection[Path] = ()
) -> Variables:
    """The variables after one update for each call, by the elements of all runs together."""
    where, new = owners(network), dict(variables)
    for calls in zip(*(one.seen for one in runs), strict=True):
        path, node, _ = calls[0]
        if path not in kept and not node.settings["fixed"]:
            update(new, where, path, node, np.concatenate([rows for *_, rows in calls]))
    return new


def update(variables: Variables, where, path: Path, node: Node, rows: np.ndarray) -> None:
    """Moves a layer's running statistics, in place."""
    s, n = node.settings, len(rows)
    bessel = n / (n - 1) if s["unbiased"] else 1
    for name, v in {"mean": rows.mean(0), "var": rows.var(0) * bessel}.items():
        place = where[path, name], name
        variables[place] = s["momentum"] * variables[place] + (1 - s["momentum"]) * v


class _State(NamedTuple):
    variables: Variables
    owners: dict[tuple[Path, str], Path]
    train: bool
    masks: Mapping[str, np.ndarray]
    inference: Collection[Path]
    kept: Collection[Path]
    seen: list[tuple[Path, Node, np.ndarray]]

    def run(self, nodes, x, within):
        values = [x]
        for node in nodes:
            values.append(self.call(node, [values[i] for i in node.inputs], within))
        return values

    def leaf(self, path, leaf, default=None):
        owner = self.owners.get((path, leaf))
        return default if owner is None else self.variables[owner, leaf]

    def call(self, node: Node, inputs: list[np.ndarray], within: Path) -> Any:
        x, path, s = inputs[0], (*within, node.name), node.settings
        match node.kind:
            case "Block":
                return self.run(s["nodes"], x, path)[-1]
            case "BatchNorm":
                return self.batch_norm(x, path, node)
            case "Dropout":
                return x * self.masks[node.name] if self.train else x
            case "Tied":
                return x @ self.leaf(path, "kernel").T
            case "Dense":
                return x @ self.leaf(path, "kernel") + self.leaf(path, "bias", 0)
            case "Conv" | "ConvTranspose":
                return window(node, x, self.leaf(path, "kernel")) + self.leaf(path, "bias", 0)
        return FUNCTIONS[node.kind](*inputs)

    def batch_norm(self, x, path, node):
        s = node.settings
        x = np.moveaxis(x, s["axis"], -1)
        mean, var = (self.leaf(path, name) for name in ("mean", "var"))
        rows = x.reshape(-1, x.shape[-1])
        self.seen.append((path, node, rows))
        if self.train and not s["fixed"]:
            if path not in self.kept:
                update(self.variables, self.owners, path, node, rows)
            if path not in self.inference:
                mean, var = rows.mean(0), rows.var(0)
        y = (x - mean) / np.sqrt(var + s["epsilon"])
        y = y * self.leaf(path, "scale", 1) + self.leaf(path, "bias", 0)
        y = FUNCTIONS[s["activation"]](y) if s["activation"] else y
        return np.moveaxis(y, -1, s["axis"])


def window(node: Node, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A convolution, position of the kernel by position."""
    s, pads = node.settings, window_pads(node)
    strides, groups = s["strides"], s.get("feature_group_count", 1)
    if node.kind == "ConvTranspose":
        if s["transpose_kernel"]:
            kernel = np.swapaxes(kernel[::-1, ::-1], 2, 3)
        spread = [(n - 1) * stride + 1 for n, stride in zip(node.x, strides, strict=False)]
        apart = np.zeros((len(x), *spread, x.shape[-1]))
        apart[:, :: strides[0], :: strides[1]] = x
        x, strides = apart, (1, 1)
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(str(s["padding"]), "constant")
    x = np.pad(x, [(0, 0), *pads, (0, 0)], mode)
    x = x.reshape(*x.shape[:-1], groups, -1)
    kernel = kernel.reshape(*kernel.shape[:-1], groups, -1)
    sizes = output_shape(node)[:-1]
    y = 0
    for at in itertools.product(*map(range, s["kernel_size"])):
        rows, columns = (
            slice(a * d, a * d + (size - 1) * stride + 1, stride)
            for a, d, size, stride in zip(at, s["kernel_dilation"], sizes, strides, strict=True)
        )
        y = y + np.einsum("nhwgi,igo->nhwgo", x[:, rows, columns], kernel[at])
    return y.reshape(*y.shape[:3], -1)


def _gelu(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": _gelu,
    "add": lambda a, b: a + b,
    "concat": lambda a, b: np.concatenate([a, b], -1),
    "flatten": lambda x: x.reshape(len(x), -1),
    "mean": lambda x: x.mean(tuple(range(1, x.ndim - 1))),
}
