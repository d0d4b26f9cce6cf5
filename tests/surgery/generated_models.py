"""A generated network in Linen and in NNX, as `bn_jax.surgery` takes models.

They are called with `train=`. What dropout multiplies by in training is recorded, so that
the reference can do the same.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from generated_nodes import STATISTICS, Network, Node, Variables, shapes, walk

import bn_jax.linen
import bn_jax.nnx

FUNCTIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "add": lambda a, b: a + b,
    "concat": lambda a, b: jnp.concatenate([a, b], -1),
    "flatten": lambda x: x.reshape(len(x), -1),
    "mean": lambda x: x.mean(tuple(range(1, x.ndim - 1))),
}
OWN = ("nodes", "transform", "shares", "home", "fixed")  # settings that Flax does not have
# (name of the dropout, first number of the batch, mask) of every call, as the program leaves
# them: to wait for a value within a callback can wait for ever.
MASKS: list[tuple[str, Any, Any]] = []


def fields(node: Node) -> dict[str, Any]:
    """The arguments of the layer's class."""
    s = {k: v for k, v in node.settings.items() if k not in OWN}
    if node.kind == "BatchNorm":
        activation, unbiased = s.pop("activation"), s.pop("unbiased")
        if node.settings["home"] == "ours":
            s |= {"activation": FUNCTIONS.get(activation), "unbiased": unbiased}
    return s


def layer_class(node: Node, ours: Any, flax: Any) -> Any:
    home = ours if node.settings.get("home") == "ours" else flax
    return getattr(home, "Linear" if (node.kind, flax) == ("Dense", nnx) else node.kind)


def run(nodes, layers, x, train, first):
    """The values of the nodes, in either home.

    Args:
      nodes: of the network or of a block.
      layers: by name.
      x, train: of the call.
      first: the first number of the batch, by which masks are recorded.
    """
    values = [x]
    for node in nodes:
        inputs, layer = [values[i] for i in node.inputs], layers.get(node.name)
        values.append(_call(node, layer, inputs, train, first))
    return values


def _call(node, layer, inputs, train, first):
    x = inputs[0]
    match node.kind:
        case "Block":
            return layer(x, train, first)
        case "BatchNorm":
            return layer(x, use_running_average=node.settings["fixed"] or not train)
        case "Dropout":
            mask = layer(jnp.ones_like(x), deterministic=not train)
            if train:
                jax.debug.callback(functools.partial(_record, node.name), first, mask)
            return x * mask
        case "Tied" if isinstance(layer, nnx.Module):
            return x @ layer.kernel[...].T
        case "Tied":
            return x @ layer.variables["params"]["kernel"].T
    return FUNCTIONS[node.kind](*inputs) if node.kind in FUNCTIONS else layer(x)


def _record(name, first, mask):
    MASKS.append((name, first, mask))


def masks_of(x) -> dict[str, np.ndarray]:
    """What the dropouts multiplied by in the last call with this batch."""
    jax.effects_barrier()
    # A callback in another thread is not within `enable_x64`, and is given float32.
    of_this = [m for m in MASKS if np.float32(m[1]) == np.float32(x.flat[0])]
    return {name: np.asarray(mask) for name, _, mask in of_this}


def _named(nodes):
    """A node for each layer."""
    return {n.name: n for n in nodes if n.name and n.kind != "Tied"}


def _outputs(values, outputs):
    found = tuple(values[i] * factor for i, factor in outputs)
    return found if len(found) > 1 else found[0]


class LinenBlock(nn.Module):
    nodes: tuple[Node, ...]

    @nn.compact
    def __call__(self, x, train=False, first=None):
        return self.values(x, train, first)[-1]

    def values(self, x, train, first):
        layers = {name: _linen(node) for name, node in _named(self.nodes).items()}
        return run(self.nodes, layers, x, train, first)


class LinenNetwork(LinenBlock):
    outputs: tuple[tuple[int, float], ...] = ()

    @nn.compact
    def __call__(self, x, train=False):
        return _outputs(self.values(x, train, x.ravel()[0]), self.outputs)


def _linen(node):
    if node.kind != "Block":
        return layer_class(node, bn_jax.linen, nn)(**fields(node), name=node.name)
    block = LinenBlock
    if transform := node.settings["transform"]:
        block = getattr(nn, transform)(LinenBlock, static_argnums=(2,))
    return block(node.settings["nodes"], name=node.name)


class NnxBlock(nnx.Module):
    def __init__(self, nodes, rngs):
        self.nodes = nodes
        for name, node in _named(nodes).items():
            setattr(self, name, _nnx(node, rngs))

    def __call__(self, x, train=False, first=None):
        return self.values(x, train, first)[-1]

    def values(self, x, train, first):
        named = _named(self.nodes).items()
        layers = {name: _transformed(getattr(self, name), node) for name, node in named}
        return run(self.nodes, layers, x, train, first)


class NnxNetwork(NnxBlock):
    def __init__(self, nodes, outputs, rngs):
        super().__init__(nodes, rngs)
        self.outputs = outputs
        for path, node in walk(nodes):
            other, which = node.settings.get("shares", (None, ()))
            for leaf in shapes(node):
                if which == "all" or leaf in which:
                    setattr(self.at(path), leaf, getattr(self.at(other), leaf))

    def __call__(self, x, train=False):
        return _outputs(self.values(x, train, x.ravel()[0]), self.outputs)

    def at(self, path):
        return functools.reduce(getattr, path, self)


def _nnx(node, rngs):
    common = fields(node) | {"rngs": rngs}
    match node.kind:
        case "Block":
            return NnxBlock(node.settings["nodes"], rngs)
        case "BatchNorm":
            sizes = ((0, *node.x)[node.settings["axis"]],)
        case "Dropout":
            sizes = ()
        case _:
            sizes = (node.x[-1], common.pop("features"))
    return layer_class(node, bn_jax.nnx, nnx)(*sizes, **common)


def _transformed(layer, node):
    transform = node.settings.get("transform")
    if not transform:
        return layer

    def call(x, train, first):
        of = getattr(nnx, transform)(lambda block, x, first: block(x, train, first))
        return of(layer, x, first)

    return call


def _in_linen(network: Network, values: Variables) -> tuple[nn.Module, Any]:
    found: dict[str, dict] = {"params": {}, "batch_stats": {}}
    for (path, leaf), v in values.items():
        collection = "batch_stats" if leaf in STATISTICS else "params"
        found[collection][*path, leaf] = jnp.asarray(v)
    variables = {name: traverse_util.unflatten_dict(v) for name, v in found.items()}
    return LinenNetwork(network.nodes, outputs=network.outputs), variables


def _in_nnx(network: Network, values: Variables) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: NnxNetwork(network.nodes, network.outputs, nnx.Rngs(0)))
    )

    def filled(path, v):
        if isinstance(v, nnx.RngKey):
            return v.replace(jax.random.key(network.seed))
        if isinstance(v, nnx.RngCount):
            return v.replace(jnp.uint32(0))
        return v.replace(jnp.asarray(values[path[:-1], path[-1]]))

    return graphdef, nnx.from_flat_state((p, filled(p, v)) for p, v in nnx.to_flat_state(state))


class Home(NamedTuple):
    """A network in Linen or NNX."""

    name: str
    network: Network
    model: Any
    variables: Any

    def with_values(self, values: Variables) -> Home:
        return made(self.name, self.network, values)

    def training(self) -> dict[str, Any]:
        """The keywords of a call in training."""
        rngs = {"rngs": {"dropout": jax.random.key(0)}} if self.name == "linen" else {}
        return {"train": True} | rngs


def made(name: str, network: Network, values: Variables) -> Home:
    make = {"linen": _in_linen, "nnx": _in_nnx}[name]
    return Home(name, network, *make(network, values))


def homes(network: Network, values: Variables) -> list[Home]:
    """NNX, and Linen before it where it has the words."""
    names = ["linen", "nnx"] if network.in_linen else ["nnx"]
    return [made(name, network, values) for name in names]


def one_home(network: Network, values: Variables) -> Home:
    """Linen or NNX, in turn."""
    found = homes(network, values)
    return found[network.seed % len(found)]


def apply(model: Any, variables: Any, x: Any, **call: Any) -> tuple[list[Any], Any]:
    """The outputs, and the variables after the call, in either home."""
    if isinstance(model, nnx.GraphDef):
        module = nnx.merge(model, variables, copy=True)
        y = module(x, **call)
        return listed(y), nnx.state(module)
    y, new = model.apply(variables, x, **call, mutable=["batch_stats"])
    return listed(y), {**variables, **new}


def listed(y: Any) -> list[Any]:
    return list(y) if isinstance(y, tuple) else [y]


def stored(variables: Any) -> Variables:
    """Parameters and statistics, by (path, leaf)."""
    if isinstance(variables, nnx.State):
        flat = nnx.to_flat_state(nnx.filter_state(variables, [nnx.Param, nnx.BatchStat]))
        return {(path[:-1], path[-1]): np.asarray(v.get_value()) for path, v in flat}
    flat = traverse_util.flatten_dict(dict(variables))
    return {(tuple(path), leaf): np.asarray(v) for (_, *path, leaf), v in flat.items()}
