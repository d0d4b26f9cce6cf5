"""A generated network in torch, with the parameters of `generated_nodes.draw`."""

from __future__ import annotations

import numpy as np
import torch
from generated_nodes import Network, Node, Path, Variables, walk, wide, window_pads

nn, F = torch.nn, torch.nn.functional
FUNCTIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "add": lambda a, b: a + b,
    "concat": lambda a, b: torch.cat([a, b], 1),
    "flatten": lambda x: x.flatten(1),
    "mean": lambda x: x.mean(tuple(range(2, x.ndim))),
}


class Block(nn.Module):
    """Nodes.

    Args:
      nodes: of the network or of a block.
      names: the name in torch of a layer of this name.
      order: puts the names into the order of their definitions.
    """

    def __init__(self, nodes, names, order):
        super().__init__()
        self.nodes, self.names = nodes, names
        named = {n.name: n for n in nodes if n.name and n.kind != "Tied"}
        for name in order(list(named)):
            node = named[name]
            inner = node.settings.get("nodes")
            layer = Block(inner, names, order) if inner else _layer(node)
            setattr(self, names(name), layer)

    def forward(self, x):
        return self.values(x)[-1]

    def values(self, x):
        values = [x]
        for node in self.nodes:
            values.append(self.call(node, [values[i] for i in node.inputs]))
        return values

    def call(self, node, inputs):
        if node.kind in FUNCTIONS:
            return FUNCTIONS[node.kind](*inputs)
        layer, x = getattr(self, self.names(node.name)), inputs[0]
        if node.kind == "Tied":
            return F.linear(x.movedim(1, -1), layer.weight.T).movedim(-1, 1)
        if node.kind == "Dense":
            return layer(x.movedim(1, -1)).movedim(-1, 1)
        activation = node.settings.get("activation")
        return FUNCTIONS[activation](layer(x)) if activation else layer(x)


class Module(Block):
    def __init__(self, nodes, outputs, names, order):
        super().__init__(nodes, names, order)
        self.outputs = outputs

    def forward(self, x):
        values = self.values(x)
        found = tuple(values[i] * factor for i, factor in self.outputs)
        return found if len(found) > 1 else found[0]


def _layer(node: Node) -> nn.Module:
    s = node.settings
    match node.kind:
        case "Dropout":
            return nn.Dropout(s["rate"])
        case "Dense":
            return nn.Linear(node.x[-1], s["features"], s["use_bias"])
        case "BatchNorm":
            kind = nn.BatchNorm2d if len(node.x) == 3 else nn.BatchNorm1d
            return kind(node.x[-1], s["epsilon"], 1 - s["momentum"], s["use_scale"])
    pads = window_pads(node)
    common = {
        "in_channels": node.x[-1], "out_channels": s["features"], "bias": s["use_bias"],
        "kernel_size": s["kernel_size"], "stride": s["strides"],
        "dilation": s["kernel_dilation"],
    }  # fmt: skip
    if node.kind == "ConvTranspose":
        padding = tuple(k - 1 - low for k, (low, _) in zip(wide(node), pads, strict=True))
        more = tuple(high - low for low, high in pads)
        return nn.ConvTranspose2d(**common, padding=padding, output_padding=more)
    mode = {"CIRCULAR": "circular", "REFLECT": "reflect"}.get(str(s["padding"]), "zeros")
    padding = "same" if s["padding"] == "SAME" else tuple(low for low, _ in pads)
    groups = s["feature_group_count"]
    return nn.Conv2d(**common, padding=padding, padding_mode=mode, groups=groups)


def in_torch(network: Network, values: Variables, *, names=str, order=list) -> Module:
    """The module, in evaluation; `names` and `order` as in `Block`.

    What follows a flattening has its rows as they are drawn, not in torch's order.
    """
    module = Module(network.nodes, network.outputs, names, order).double().eval()
    arrays = {
        ".".join([*map(names, path), name]): torch.tensor(np.array(v))
        for path, node in walk(network.nodes)
        for name, v in _arrays(node, path, values).items()
    }
    module.load_state_dict(arrays, strict=False)
    return module


def _arrays(node: Node, path: Path, values: Variables):
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    found = {names[leaf]: v for (p, leaf), v in values.items() if p == path and leaf in names}
    match node.kind:
        case "Dense":
            found["weight"] = values[path, "kernel"].T
        case "ConvTranspose" if not node.settings["transpose_kernel"]:
            found["weight"] = values[path, "kernel"][::-1, ::-1].transpose(2, 3, 0, 1)
        case "Conv" | "ConvTranspose":
            found["weight"] = values[path, "kernel"].transpose(3, 2, 0, 1)
    return found


def outputs(module: Module, x: np.ndarray) -> list[np.ndarray]:
    """With the features last, as x has them."""
    with torch.no_grad():
        y = module(torch.tensor(np.moveaxis(x, -1, 1)))
    return [np.moveaxis(v.numpy(), 1, -1) for v in (y if isinstance(y, tuple) else (y,))]
