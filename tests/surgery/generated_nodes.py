"""A small network as a list of nodes, which prints, and its Variables by (path, leaf).

`generated.py` draws networks, `generated_reference.py` computes what they return in NumPy,
`generated_models.py` and `generated_torch.py` make them in Linen, NNX and torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Path = tuple[str, ...]
Variables = dict[tuple[Path, str], np.ndarray]
LINEAR = ("Dense", "Conv", "ConvTranspose")
STATISTICS, AFFINE = ("mean", "var"), ("scale", "bias")


class Node(NamedTuple):
    """One operation.

    Attributes:
      kind: of layer, in Linen's words; or a function; Tied, a Dense's kernel transposed; or
        Block, a submodule.
      name: of the layer, "" of functions. Two nodes of one name are two calls of one layer.
      inputs: numbers of values: 0 is the network's input (a block's own), i that of node i.
      x: shape of the first input, without the batch.
      settings: in Linen's words. `shares` has the path of a layer whose Variables it has,
        and which of them; a BatchNorm that is `fixed` uses running statistics in training
        too; a Block has `nodes` and a `transform`.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    x: tuple[int, ...]
    settings: dict[str, Any] = {}  # noqa: RUF012

    def lines(self, number: int) -> list[str]:
        """As printed."""
        plain = [str(v) for v in (None, False, 1, (1, 1))]
        said = {k: str(v) for k, v in self.settings.items() if k != "nodes"}
        settings = "".join(f" {k}={v}" for k, v in said.items() if v not in plain)
        name = f"{self.kind} {self.name}".strip()
        called = f"{number} = {name}({', '.join(map(str, self.inputs))}){settings}"
        return [called, *(f"  {line}" for line in _lines(self.settings.get("nodes", ())))]


def _lines(nodes):
    return [line for i, node in enumerate(nodes, 1) for line in node.lines(i)]


class Network(NamedTuple):
    """A network.

    Attributes:
      seed: of the network, its parameters and its data.
      shape: of the input, with the batch.
      nodes: in the order of the calls.
      outputs: (number of a value, factor) of each.
    """

    seed: int
    shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[tuple[int, float], ...]

    def __str__(self):
        outputs = ", ".join(f"{factor:.3g} * {i}" for i, factor in self.outputs)
        lines = [f"seed {self.seed}: 0 is of {self.shape}", *_lines(self.nodes)]
        return "\n".join([*lines, f"returns {outputs}"])

    @property
    def in_linen(self) -> bool:
        """Whether no layer has another's Variables, for which Linen has no words."""
        return not any("shares" in node.settings for _, node in walk(self.nodes))

    def norms(self) -> dict[Path, Node]:
        """The BatchNorms."""
        return {path: n for path, n in walk(self.nodes) if n.kind == "BatchNorm"}

    def trained(self) -> set[Path]:
        """The BatchNorms that normalise by the batch in training."""
        return {path for path, node in self.norms().items() if not node.settings["fixed"]}

    def calls(self) -> dict[Path, int]:
        """How often each layer is called, or read."""
        paths = [path for path, node in walk(self.nodes) if node.name]
        return {path: paths.count(path) for path in paths}

    def kinds(self) -> set[str]:
        return {node.kind for _, node in walk(self.nodes)}


def walk(nodes: Sequence[Node], within: Path = ()) -> Iterator[tuple[Path, Node]]:
    """(path, node) of every call; those of a block that is called twice come twice."""
    for node in nodes:
        path = (*within, node.name)
        yield path, node
        yield from walk(node.settings.get("nodes", ()), path)


def shapes(node: Node) -> dict[str, tuple[int, ...]]:
    """Of the Variables of a layer, by leaf."""
    s, features = node.settings, node.settings.get("features")
    match node.kind:
        case "Dense":
            found = {"kernel": (node.x[-1], features), "bias": (features,)}
        case "Conv":
            inputs = node.x[-1] // s["feature_group_count"]
            found = {"kernel": (*s["kernel_size"], inputs, features), "bias": (features,)}
        case "ConvTranspose":
            ends = (features, node.x[-1]) if s["transpose_kernel"] else (node.x[-1], features)
            found = {"kernel": (*s["kernel_size"], *ends), "bias": (features,)}
        case "BatchNorm":
            found = dict.fromkeys((*STATISTICS, *AFFINE), ((0, *node.x)[s["axis"]],))
        case _:
            return {}
    wanted = {"bias": s["use_bias"], "scale": s.get("use_scale")}
    return {leaf: shape for leaf, shape in found.items() if wanted.get(leaf, True)}


def owners(network: Network) -> dict[tuple[Path, str], Path]:
    """Under whose path each leaf of each layer is stored: of several the first by name."""
    found = {(path, leaf): path for path, n in walk(network.nodes) for leaf in shapes(n)}
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path, node in walk(network.nodes):
        other, which = node.settings.get("shares", (None, ()))
        for leaf in shapes(node):
            if which == "all" or leaf in which:
                groups.setdefault((other, leaf), [other]).append(path)
    for (_, leaf), group in groups.items():
        found |= {(path, leaf): min(group) for path in group}
    return found


def draw(network: Network) -> Variables:
    """Values of all Variables; the running variances are over 3 decades."""
    rng, drawn = np.random.default_rng((network.seed, 1)), {}
    sizes = {(p, leaf): s for p, n in walk(network.nodes) for leaf, s in shapes(n).items()}
    for (path, leaf), owner in owners(network).items():
        shape = sizes[path, leaf]
        if (owner, leaf) in drawn:
            continue
        match leaf:
            case "kernel":
                value = rng.normal(size=shape) * 1.5 / math.sqrt(math.prod(shape[:-1]))
            case "var":
                value = 10 ** rng.uniform(-2, 1, shape)
            case "scale":
                value = rng.choice([-1, 1], shape) * rng.uniform(0.3, 2, shape)
            case _:
                value = rng.normal(size=shape)
        drawn[owner, leaf] = value
    return drawn


def batches(network: Network, number: int) -> np.ndarray:
    """`[number, *shape]`, of another mean than 0 and another variance than 1."""
    rng = np.random.default_rng((network.seed, 2))
    return 0.3 + 1.2 * rng.normal(size=(number, *network.shape))


def wide(node: Node) -> list[int]:
    """The sizes of the dilated kernel."""
    s = node.settings
    sizes = zip(s["kernel_size"], s["kernel_dilation"], strict=True)
    return [(k - 1) * d + 1 for k, d in sizes]


def window_pads(node: Node) -> list[tuple[int, int]]:
    """What is added at both ends of each position.

    Of a transposed convolution, after the zeros between its inputs.
    """
    s, pads = node.settings, []
    for i, (n, k, stride) in enumerate(zip(node.x[:-1], wide(node), s["strides"], strict=True)):
        if not isinstance(s["padding"], str):
            pads.append(s["padding"][i])
        elif s["padding"] in ("CIRCULAR", "REFLECT"):
            pads.append(((k - 1) // 2, k // 2))
        elif node.kind == "Conv":
            total = max((-(-n // stride) - 1) * stride + k - n, 0) * (s["padding"] == "SAME")
            pads.append((total // 2, total - total // 2))
        elif s["padding"] == "SAME":
            total = k + stride - 2
            low = k - 1 if stride > k - 1 else -(-total // 2)
            pads.append((low, total - low))
        else:
            pads.append((k - 1, k - 1 + max(stride - k, 0)))
    return pads


def output_shape(node: Node) -> tuple[int, ...]:
    """What a linear layer makes of x, without the batch."""
    s, features = node.settings, node.settings["features"]
    if node.kind == "Dense":
        return (*node.x[:-1], features)
    sizes = []
    for n, (low, high), k, stride in zip(
        node.x[:-1], window_pads(node), wide(node), s["strides"], strict=True
    ):
        if node.kind == "Conv":
            sizes.append((n + low + high - k) // stride + 1)
        else:
            sizes.append((n - 1) * stride + 1 + low + high - k + 1)
    return (*sizes, features)
