"""Generated networks from torch: they compute what torch does, or are refused."""

import importlib

import numpy as np
import pytest
from generated import ACTIVATIONS, EPSILONS
from generated_models import one_home
from generated_nodes import batches, draw, walk
from generated_reference import run
from test_generated import assert_close, compiled, seeds, shown

from bn_jax.surgery import convert

pytestmark = [
    pytest.mark.usefixtures("x64"),
    # torch says so of itself; the numbers are the same.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
OPTIONS = {"sharing": False, "axes": False, "torch": True}


@pytest.fixture(scope="module")
def there():
    """`generated_torch`, which takes seconds to import."""
    pytest.importorskip("torch")
    return importlib.import_module("generated_torch")


@seeds(7000, 2, 30)
def test_torch_itself(seed, there):
    network = shown(seed, **OPTIONS)
    values, (x,) = draw(network), batches(network, 1)
    # After a flattening the features are in another order there.
    if "flatten" not in network.kinds():
        got = there.outputs(there.in_torch(network, values), x)
        assert_close(got, run(network, values, x).outputs)


def converted(foreign, network, x):
    """The model, in Linen or NNX, and its variables; or None of both if it is refused."""
    home = one_home(network, draw(network._replace(seed=network.seed + 1)))
    try:
        return home.model, convert.from_torch(
            foreign, home.model, home.variables, x,
            train=False, tolerance=1e-10, ignore=("unbiased",),
        )  # fmt: skip
    except ValueError as error:
        print(error)
        return None, None


@seeds(7000, 3, 70)
def test_from_torch(seed, there):
    """Layers defined in another order, or of other names."""
    network = shown(seed, **OPTIONS)
    values, (x, other) = draw(network), batches(network, 2)
    options = {}
    if shuffled := seed % 2 == 1:
        options["order"] = np.random.default_rng(seed).permutation
    if renamed := seed % 3 == 0:
        options["names"] = "layer_{}".format
    print("shuffled" * shuffled, "renamed" * renamed)
    module = there.in_torch(network, values, **options)
    model, new = converted(module, network, x)
    if new is not None:
        assert_close(compiled(model)(new, other)[0], there.outputs(module, other))
    else:
        assert not unmistakable(network) or (shuffled and renamed)


def unmistakable(network) -> bool:
    """Whether layers are called once, and outputs have their features in torch's order."""
    turned = _turned(network.nodes, False)
    if "Tied" in network.kinds() or any(turned[i] for i, _ in network.outputs):
        return False
    return max(network.calls().values()) == 1


def _turned(nodes, first):
    """Of the values, whether their features are in another order in torch."""
    found = [first]
    for node in nodes:
        given = [found[i] for i in node.inputs]
        match node.kind:
            case "flatten" | "Dense":
                found.append(node.kind == "flatten")
            case "Block":
                found.append(_turned(node.settings["nodes"], *given)[-1])
            case _:
                found.append(any(given))
    return found


@seeds(7200, 3, 60)
def test_from_torch_of_another_network(seed, there):
    """Of the same Variables. Refused; a state_dict, of which nothing else is known, always."""
    network = shown(seed, **OPTIONS)
    values, (x, other) = draw(network), batches(network, 2)
    node, change = changes(network, np.random.default_rng(seed))
    print(f"but in torch {change} for {node.lines(0)[0]}")
    other_network = network._replace(nodes=changed(network.nodes, node, change))
    module = there.in_torch(other_network, values)
    model, new = converted(module if seed % 3 else module.state_dict(), network, x)
    if new is not None:
        assert seed % 3
        assert_close(compiled(model)(new, other)[0], there.outputs(module, other))


def changes(network, rng):
    """A node and something that can be otherwise in it, at random."""
    found = []
    for _, node in walk(network.nodes):
        s = node.settings
        if node.kind == "BatchNorm":
            found += [(node, {"epsilon": e}) for e in EPSILONS if e != s["epsilon"]]
            activations = ACTIVATIONS if s["home"] == "ours" else ()
            found += [(node, {"activation": a}) for a in activations if a != s["activation"]]
        if node.kind in ACTIVATIONS:
            found += [(node, {"kind": a}) for a in ACTIVATIONS if a != node.kind]
        if node.kind == "Conv" and s["padding"] in ("SAME", "CIRCULAR", "REFLECT"):
            # An odd window with strides of 1 leaves the shape as it is, however it pads.
            same = all(k % 2 for k in s["kernel_size"]) and s["strides"] == (1, 1)
            named = ("SAME", "CIRCULAR", "REFLECT") if same else ()
            found += [(node, {"padding": p}) for p in named if p != s["padding"]]
            found += [(node, {"kernel_dilation": s["kernel_dilation"][::-1]})] if same else []
    return found[rng.integers(len(found))]


def changed(nodes, old, change):
    """With other settings of a layer, in all its calls; or with another function."""

    def one(node):
        if node.kind == "Block":
            inner = changed(node.settings["nodes"], old, change)
            return node._replace(settings=node.settings | {"nodes": inner})
        if "kind" in change:
            return node._replace(**change) if node is old else node
        alike = (node.name, node.kind) == (old.name, old.kind)
        return node._replace(settings=node.settings | change) if alike else node

    return tuple(map(one, nodes))
