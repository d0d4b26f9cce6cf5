"""Generated networks themselves, folded, frozen, and brought from Linen to NNX and back.

A failing test prints its network, which `generate(seed)` makes again. Most seeds are `long`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generated import generate
from generated_models import apply, homes, masks_of, one_home, stored
from generated_nodes import LINEAR, STATISTICS, Network, batches, draw, owners
from generated_reference import run

from bn_jax.surgery import convert, fold, freeze
from bn_jax.surgery.calls import spelled
from bn_jax.surgery.compare import widen

pytestmark = pytest.mark.usefixtures("x64")


def seeds(first, few, many, also=()):
    """So many networks from `first` on; all but a few, and some by seed, are long tests."""
    quick = {*range(first, first + few), *also}
    found = range(first, first + many)
    long = pytest.mark.long
    marked = [s if s in quick else pytest.param(s, marks=long) for s in found]
    return pytest.mark.parametrize("seed", marked)


def shown(seed, **options) -> Network:
    network = generate(seed, **options)
    print(network)
    return network


def compiled(model, **call):
    return jax.jit(lambda variables, x: apply(model, variables, x, **call))


def assert_close(got, want, tolerance=1e-9):
    """Every element of an output by its own scale: the largest that it has in the batch."""
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        # And a little of the whole array's: gelu of -9 is rounding alone.
        scale = np.abs(b).max(0) + 1e-4 * np.abs(b).max()
        np.testing.assert_array_less(np.abs(a - b).max(0), tolerance * scale + 1e-300)


def assert_variables(got, want):
    got = stored(got)
    assert got.keys() == want.keys()
    for name, v in want.items():
        np.testing.assert_allclose(got[name], v, 1e-9, 1e-10, err_msg=str(name))


@pytest.mark.parametrize("train", [False, True])
@seeds(0, 2, 40)
def test_the_networks_themselves(seed, train):
    network = shown(seed)
    values, (x,) = draw(network), batches(network, 1)
    for home in homes(network, values):
        call = home.training() if train else {}
        y, after = compiled(home.model, **call)(home.variables, x)
        want = run(network, values, x, train=train, masks=masks_of(x))
        assert_close(y, want.outputs)
        assert_variables(after, want.variables)


@seeds(500, 1, 25)
def test_from_linen_to_nnx_and_back(seed):
    network = shown(seed, sharing=False)
    values, (x, other) = draw(network), batches(network, 2)
    here, there = homes(network, values)[:: -1 if seed % 2 else 1]
    there = there.with_values(draw(network._replace(seed=seed + 1)))
    source = here.model, here.variables
    new = convert.from_flax(source, there.model, there.variables, x, train=False)
    y, _ = compiled(there.model)(new, other)
    assert_close(y, run(network, values, other).outputs)


@seeds(1000, 1, 80, also=(1010,))
def test_folded_is_unfolded(seed):
    network = shown(seed)
    values, (x, other) = draw(network), batches(network, 2)
    home = one_home(network, values)
    folded = fold(home.model, home.variables, x, train=False)
    print(home.name, folded.pairs, folded.refused)
    y, _ = compiled(folded.model)(folded.variables, other)
    assert_close(y, run(network, values, other).outputs)
    pairs = {pair.norm for pair in folded.pairs}
    assert not pairs & folded.refused.keys()
    assert pairs | folded.refused.keys() == network.norms().keys()
    assert all(folded.refused.values())
    # What is refused is so for the way the layers are connected.
    assert not any("it changes the outputs" in why for why in folded.refused.values())
    assert foldable(network) <= pairs


def in_float32(network, number):
    """The variables and batches."""
    values = {name: np.float32(v) for name, v in draw(network).items()}
    return values, np.float32(batches(network, number))


@seeds(9041, 1, 30)
def test_folded_in_float32(seed):
    """Rounding refuses nothing, however deep the network is, and saturated its activations."""
    network = shown(seed)
    with jax.enable_x64(False):
        values, (x, other) = in_float32(network, 2)
        home = one_home(network, values)
        folded = fold(home.model, home.variables, x, train=False)
        print(home.name, folded.refused)
        y, _ = compiled(folded.model)(folded.variables, other)
        assert_close(y, [np.float32(v) for v in run(network, values, other).outputs], 1e-2)
    assert foldable(network) <= {pair.norm for pair in folded.pairs}


def bent(x, kernel, *args, **kwargs):
    """Not quite linear."""
    y = jax.lax.dot_general(x, kernel, *args, **kwargs)
    return y + 1e-3 * jnp.sin(3 * y)


@seeds(9541, 1, 30)
def test_a_layer_that_computes_otherwise_is_not_folded(seed):
    """In float32, where it is hard to tell from rounding; and others are."""
    network = shown(seed, sharing=False)
    dense = [n.name for n in network.nodes if n.kind == "Dense"]
    if not dense:
        return
    name = dense[seed % len(dense)]

    def without(node):
        return node._replace(kind="bent") if node.name == name else node

    def within(node):
        changed = {"dot_general": bent} if (node.kind, node.name) == ("Dense", name) else {}
        return node._replace(settings=node.settings | changed)

    sure = foldable(network._replace(nodes=tuple(map(without, network.nodes))))
    # Beside two layers a norm is offered to the one before.
    sure -= {(n.name,) for n in network.nodes if network.nodes[n.inputs[0] - 1].name == name}
    network = network._replace(nodes=tuple(map(within, network.nodes)))
    with jax.enable_x64(False):
        values, (x, other) = in_float32(network, 2)
        home = one_home(network, values)
        folded = fold(home.model, home.variables, x, train=False)
        print(home.name, name, folded.pairs, folded.refused)
    assert sure <= {pair.norm for pair in folded.pairs}
    want, got = (
        compiled(m)(*widen((v, other)))[0]
        for m, v in ((home.model, home.variables), (folded.model, folded.variables))
    )
    assert_close(map(np.float64, got), map(np.float64, want), 1e-4)


def foldable(network: Network) -> set:
    """The BatchNorms that surely are: beside a linear layer, and neither used elsewhere."""
    found, where, calls = set(), owners(network), network.calls()

    def alone(path):
        """Called once, and with Variables of its own."""
        return calls[path] == 1 and all(
            (p == path) == (owner == path) for (p, _), owner in where.items()
        )

    def linear(node, within):
        return node and node.kind in LINEAR and alone((*within, node.name))

    def read(nodes, outputs, within):
        makers = dict(enumerate(nodes, 1))
        users = {i: [n for n in nodes if i in n.inputs] for i in range(len(nodes) + 1)}
        for i, node in makers.items():
            path = (*within, node.name)
            if node.kind == "Block" and calls[path] == 1:
                read(node.settings["nodes"], {len(node.settings["nodes"])}, path)
            if node.kind != "BatchNorm" or node.settings["axis"] != -1 or not alone(path):
                continue
            (source,), (user, *others) = node.inputs, users[i] or [None]
            once = source not in outputs and len(users[source]) == 1
            if linear(makers.get(source), within) and once:
                found.add(path)
            once = i not in outputs and not others and not node.settings["activation"]
            if linear(user, within) and once and sums_inputs_only(user):
                found.add(path)

    read(network.nodes, {i for i, _ in network.outputs}, ())
    return found


def sums_inputs_only(node) -> bool:
    """At the border too: a layer that pads with zeros, or between inputs, does not."""
    padding = node.settings.get("padding", "VALID")
    if node.kind == "ConvTranspose":
        return False
    if padding == "SAME":
        return node.settings["kernel_size"] == (1, 1)
    return padding in ("VALID", "CIRCULAR", "REFLECT") or not np.any(padding)


def patterns(paths) -> list[str]:
    return sorted(map(spelled, paths))


def some(network: Network, rng) -> tuple[set, list[str]]:
    """BatchNorms at random, with all that share their statistics, and patterns of one each."""
    where, chosen = owners(network), {}
    for path in network.norms():
        chosen.setdefault(where[path, "mean"], []).append(path)
    chosen = {owner: paths for owner, paths in sorted(chosen.items()) if rng.random() < 0.5}
    first = [spelled(paths[rng.integers(len(paths))]) for paths in chosen.values()]
    return {path for paths in chosen.values() for path in paths}, first


@seeds(2000, 4, 60, also=(2007, 2030))
def test_frozen_does_not_move(seed):
    network, rng = shown(seed), np.random.default_rng(seed)
    normalize, (keep, kept) = some(network, rng)[0], some(network, rng)
    chosen = {"normalize": patterns(normalize), "keep": kept}
    if (every := seed // 2 % 4) > 1:
        keep, normalize = network.norms(), network.norms() if every == 2 else ()
        chosen = {"normalize": "*" if every == 2 else (), "keep": "*"}
    print(chosen)
    start = values = draw(network)
    home = one_home(network, values)
    step = compiled(freeze(home.model, home.variables, **chosen), **home.training())
    for x in batches(network, 2):
        y, after = step(home.with_values(values).variables, x)
        masks = masks_of(x)
        want = run(network, values, x, train=True, masks=masks, inference=normalize, kept=keep)
        assert_close(y, want.outputs)
        assert_variables(after, want.variables)
        # As an optimizer would.
        values = {k: v if k[1] in STATISTICS else 1.1 * v for k, v in stored(after).items()}
    still = set(keep) | (network.norms().keys() - network.trained())
    for (path, leaf), owner in owners(network).items():
        if leaf in STATISTICS:
            same = np.array_equal(values[owner, leaf], start[owner, leaf])
            assert same == (path in still), (path, leaf)
