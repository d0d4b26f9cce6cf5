"""Small random networks by seed: `print(generate(3))` shows one, node by node.

Names of layers are in an order that has nothing to do with that of the calls.
"""

from __future__ import annotations

import math
import string
from typing import Any, NamedTuple

import numpy as np
from generated_nodes import AFFINE, STATISTICS, Network, Node, Path, output_shape, walk

ACTIVATIONS = ("relu", "tanh", "gelu")
EPSILONS = (1e-5, 1e-3, 1e-2)


class Options(NamedTuple):
    """What a network may have.

    Attributes:
      dropout, blocks, sharing, repeats: layers of that kind, layers that have Variables of
        another, or are called twice.
      axes: BatchNorms over another axis than the last.
      torch: only what torch has, in its words.
      layers: about the fewest and the most.
    """

    dropout: bool = True
    blocks: bool = True
    sharing: bool = True
    repeats: bool = True
    axes: bool = True
    torch: bool = False
    layers: tuple[int, int] = (2, 8)


def generate(seed: int, **options: Any) -> Network:
    """The network of a seed and these `Options`; it has a BatchNorm that is not fixed."""
    options, rng = Options(**options), np.random.default_rng(seed)
    positions = [(5, 5), (6, 6), (7, 5)][rng.integers(3)] if rng.random() < 0.65 else ()
    x = (*positions, int(rng.integers(2, 7)))
    names = rng.permutation(list(string.ascii_lowercase)).tolist()
    graph, wanted = _Graph(rng, x, options, names), rng.integers(*options.layers, endpoint=True)
    while graph.layers < wanted or not graph.learns():
        graph.grow()
    if rng.random() < 0.6:
        graph.head()
    last = len(graph.nodes)
    others = rng.permutation(np.arange(1, last))[: rng.choice([0, 0, 1, 2])].tolist()
    factors = (10.0 ** rng.uniform(-3, 5, len(others))).tolist()
    outputs = [(last, 1.0), *zip(others, factors, strict=True)]
    return Network(seed, (int(rng.choice([4, 8])), *x), tuple(graph.nodes), tuple(outputs))


class _Graph:
    """A list of nodes that grows at random.

    Attributes:
      within: path of the block that it is.
      around: the graph that has the block.
      nodes, shapes: the nodes so far; the shapes of the values, the input's first.
      layers: how many there are, those of blocks among them.
      whole: whether layers share all their Variables, or some.
    """

    def __init__(self, rng, x, options, names, within: Path = (), around: _Graph | None = None):
        self.rng, self.options, self.names = rng, options, names
        self.within, self.around = within, around
        self.nodes: list[Node] = []
        self.shapes = [tuple(x)]
        self.layers = 0
        self.whole = around.whole if around else self.chance(0.5)

    def chance(self, p):
        return self.rng.random() < p

    def pick(self, values):
        return values[int(self.rng.integers(len(values)))]

    def learns(self):
        norms = [n for _, n in walk(self.nodes) if n.kind == "BatchNorm"]
        return not all(n.settings["fixed"] for n in norms)

    @property
    def last(self):
        return len(self.nodes)

    def add(self, kind, name="", inputs=None, shape=None, **settings):
        inputs = (self.last,) if inputs is None else inputs
        x = self.shapes[inputs[0]]
        self.nodes.append(Node(kind, name, inputs, x, settings))
        self.shapes.append(x if shape is None else tuple(shape))

    def grow(self):
        """Some nodes more, or none where the choice has no place."""
        has = self.options
        weights = {
            self.linear_and_norm: 6, self.activation: 2, self.norm: 1, self.residual: 2,
            self.again: 1.5 * has.repeats, self.shared: 3 * has.sharing, self.tied: 1.5,
            self.dropout: has.dropout, self.concat: 0.5,
            self.block: 1.5 * (has.blocks and not self.around), self.head: 0.4,
        }  # fmt: skip
        p = np.array(list(weights.values()), float)
        list(weights)[self.rng.choice(len(p), p=p / p.sum())]()

    # Layers --------------------------------------------------------------------------------

    def linear_and_norm(self):
        self.linear()
        if self.chance(0.75):
            self.norm()
        if self.chance(0.4):
            self.activation()

    def linear(self):
        """Of the last value mostly."""
        source = self.last if self.chance(0.85) else int(self.rng.integers(self.last + 1))
        x, name = self.shapes[source], self.names.pop()
        kind = "Dense" if len(x) != 3 else self.pick(["Dense", *["Conv"] * 4, "ConvTranspose"])
        common = {"features": int(self.rng.integers(2, 7)), "use_bias": self.chance(0.6)}
        self.layers += 1
        for _ in range(20 if kind != "Dense" else 0):
            settings = common | {"Conv": self.conv, "ConvTranspose": self.transposed}[kind](x)
            shape = output_shape(Node(kind, name, (source,), x, settings))
            if min(shape[:-1]) >= 2 and max(shape[:-1]) <= 9:
                return self.add(kind, name, (source,), shape, **settings)
        self.add("Dense", name, (source,), (*x[:-1], common["features"]), **common)

    def window(self):
        """The settings of any, and the sizes of the dilated kernel."""
        kernel = self.pick([(3, 3), (3, 3), (1, 1), (2, 3), (2, 2)])
        strides = self.pick([(1, 1), (1, 1), (2, 2), (2, 1)])
        dilation = self.pick([(1, 1), (1, 1), (1, 1), (2, 2), (1, 2)])
        settings = {"kernel_size": kernel, "strides": strides, "kernel_dilation": dilation}
        return settings, [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]

    def conv(self, x):
        settings, wide = self.window()
        groups = [g for g in range(1, 7) if x[-1] % g == 0]
        groups = int(self.pick([1, 1, *groups, x[-1]]))
        settings["feature_group_count"] = groups
        settings["features"] = groups * int(self.rng.integers(1, max(6 // groups, 1) + 1))
        even = tuple((p, p) for p in self.rng.integers(0, 3, 2).tolist())
        uneven = tuple(map(tuple, self.rng.integers(0, 3, (2, 2)).tolist()))
        padding = ["SAME", "CIRCULAR", "REFLECT", "VALID", "VALID", even, even, uneven]
        if self.options.torch:
            # SAME with strides, and an even window round about, are uneven: not torch's.
            odd, dense = all(k % 2 for k in wide), settings["strides"] == (1, 1)
            padding = [*["SAME"] * dense, *["CIRCULAR", "REFLECT"] * odd, *padding[3:-1]]
        settings["padding"] = self.pick(padding)
        return settings

    def transposed(self, x):
        settings, wide = self.window()
        # torch's padding p and output_padding.
        p = [int(self.rng.integers(k)) for k in wide]
        more = [int(self.rng.integers(s)) for s in settings["strides"]]
        ends = zip(wide, p, more, strict=True)
        explicit = tuple((k - 1 - a, k - 1 - a + b) for k, a, b in ends)
        named = [] if self.options.torch else ["SAME", "VALID"]
        settings["padding"] = self.pick([*named, explicit])
        return settings | {"transpose_kernel": self.chance(0.5)}

    def norm(self, source=None, **shared):
        """A BatchNorm, of settings that are drawn unless they are given."""
        source = self.last if source is None else source
        ours, affine = self.chance(2 / 3), self.chance(0.8)
        several = len(self.shapes[source]) > 1
        settings = {
            "home": "ours" if ours else "flax",
            "axis": 1 if several and self.options.axes and self.chance(0.08) else -1,
            "epsilon": self.pick(EPSILONS), "momentum": self.pick([0.9, 0.99, 0.5]),
            "use_scale": affine,
            "use_bias": affine if self.options.torch else self.chance(0.8),
            "activation": self.pick(ACTIVATIONS) if ours and self.chance(0.2) else None,
            "unbiased": ours and (self.options.torch or self.chance(0.5)),
            "fixed": not shared and self.chance(0.06),
        }  # fmt: skip
        self.layers += 1
        self.add("BatchNorm", self.names.pop(), (source,), **settings | shared)

    def dropout(self):
        self.add("Dropout", self.names.pop(), rate=self.pick([0.2, 0.5]))

    # Layers once more ----------------------------------------------------------------------

    def again(self):
        """A layer or a block is called a second time."""
        found = [
            (n, made, i)
            for n, made in zip(self.nodes, self.shapes[1:], strict=True)
            for i, shape in enumerate(self.shapes)
            if n.name and shape == n.x and n.kind != "Tied"
            and not any(m.kind == "Dropout" for _, m in walk([n]))
        ]  # fmt: skip
        if found:
            node, shape, source = self.pick(found[-6:])
            self.add(node.kind, node.name, (source,), shape, **node.settings)

    def shared(self):
        """Another layer has Variables of an earlier one, which is here or around."""
        kinds = ("BatchNorm",) if self.chance(0.8) else ("Dense", "Conv")
        earlier = [
            *walk(self.nodes, self.within),
            *walk(self.around.nodes if self.around else ()),
        ]
        found = [
            (path, n, i)
            for path, n in earlier
            for i in range(self.last, max(self.last - 4, -1), -1)
            if n.kind in kinds and self.shapes[i] == n.x and "shares" not in n.settings
            and not n.settings.get("fixed")
        ]  # fmt: skip
        if not found:
            return
        path, node, source = self.pick(found)
        if node.kind == "BatchNorm":
            which = "all" if self.whole else self.pick([STATISTICS, AFFINE])
            other = {"epsilon": self.pick(EPSILONS), "shares": (path, which)}
            self.norm(source, **node.settings | other)
            return
        other = {"shares": (path, "all")}
        if not self.whole:
            other = {"shares": (path, ("kernel",)), "use_bias": self.chance(0.5)}
        self.layers += 1
        self.add(
            node.kind, self.names.pop(), (source,), output_shape(node), **node.settings | other
        )

    def tied(self):
        """A Dense's kernel, transposed, once more."""
        found = [
            (n, i)
            for n in self.nodes
            for i in range(self.last, -1, -1)
            if n.kind == "Dense" and self.shapes[i][-1] == n.settings["features"]
        ]
        if found:
            node, source = self.pick(found)
            self.add("Tied", node.name, (source,), (*self.shapes[source][:-1], node.x[-1]))

    def block(self):
        name = self.names.pop()
        inner = _Graph(self.rng, self.shapes[-1], self.options, self.names, (name,), self)
        for _ in range(int(self.rng.integers(1, 3))):
            inner.grow()
        if not inner.layers:
            inner.linear_and_norm()
        self.layers += inner.layers
        self.add(
            "Block", name, None, inner.shapes[-1],
            nodes=tuple(inner.nodes), transform=self.pick([None, "remat", "remat", "jit"]),
        )  # fmt: skip

    # Functions -----------------------------------------------------------------------------

    def activation(self):
        self.add(self.pick(ACTIVATIONS))

    def residual(self):
        alike = [i for i in range(self.last) if self.shapes[i] == self.shapes[-1]]
        if alike:
            self.add("add", "", (self.last, self.pick(alike)))

    def concat(self):
        *positions, features = self.shapes[-1]
        found = [
            (i, shape[-1])
            for i, shape in enumerate(self.shapes[:-1])
            if [*shape[:-1]] == positions and shape[-1] + features <= 8
        ]
        if found:
            other, more = self.pick(found)
            self.add("concat", "", (self.last, other), (*positions, features + more))

    def head(self):
        """An image becomes a vector."""
        *positions, features = self.shapes[-1]
        if not positions:
            return
        if self.chance(0.5) or math.prod(self.shapes[-1]) > 300:
            self.add("mean", shape=(features,))
        else:
            self.add("flatten", shape=(math.prod(self.shapes[-1]),))
        if self.chance(0.7):
            self.linear()
