"""Generated networks run on data: recalibrated, accumulated, diagnosed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generated_models import apply, listed, masks_of, one_home
from generated_nodes import batches, draw, owners
from generated_reference import moved, population, run
from test_generated import assert_variables, patterns, seeds, shown, some

from bn_jax.surgery import accumulate, accumulate_exactly, diagnose, freeze, recalibrate
from bn_jax.surgery.tree import join, split

pytestmark = pytest.mark.usefixtures("x64")


def uneven(network, number):
    """Batches of which the last is smaller."""
    *data, last = batches(network, number)
    return [*data, last[: len(last) // 2 + 1]]


def runs_of(network, values, data, **call):
    """What each batch did in training, with the masks that dropout had for it."""
    return [run(network, values, x, train=True, masks=masks_of(x), **call) for x in data]


@seeds(3000, 4, 50)
def test_recalibrated_is_the_population(seed):
    network = shown(seed)
    values, data = draw(network), uneven(network, 3)
    home, only = one_home(network, values), "*"
    wanted = some(network, np.random.default_rng(seed))[0] & network.trained()
    if seed % 3 == 0 and wanted:
        only = patterns(wanted)
    else:
        wanted = network.trained()
    print(home.name, "only", only)
    new = recalibrate(home.model, home.variables, data, only=only, **home.training())
    assert_variables(new, values | population(network, runs_of(network, values, data), wanted))
    first, second = map(masks_of, data[:2])
    for name, mask in first.items():
        if mask.size >= 100:
            assert (mask != second[name]).any(), f"{name}: the same mask for two batches"


@seeds(3500, 1, 20)
def test_recalibrated_layer_by_layer(seed):
    network = shown(seed, dropout=False)
    values, data = draw(network), uneven(network, 2)
    home = one_home(network, values)
    new = recalibrate(home.model, home.variables, data, layer_by_layer=True, **home.training())
    where, trained, done = owners(network), network.trained(), set()
    for path, *_ in run(network, values, data[0], train=True).seen:
        if path in trained - done:
            alike = {p for p in trained if where[p, "mean"] == where[path, "mean"]}
            runs = runs_of(network, values, data, inference=done, kept=trained)
            values = values | population(network, runs, alike)
            done |= alike
    assert_variables(new, values)


# Accumulation: by hand ---------------------------------------------------------------------


def loss_of(network):
    """Of outputs and a number for each example; none of the outputs is most of it."""

    def one(output, factor, targets):
        rows = (output / factor).reshape(len(output), -1)
        return jnp.mean(jnp.sin(rows + targets[:, None]))

    def loss(output, targets):
        pairs = zip(listed(output), network.outputs, strict=True)
        return sum(one(o, factor, targets) for o, (_, factor) in pairs)

    return loss


def ordinary_step(home):
    """(params, state, x, targets, number) to the value, the state after, and gradients.

    Running statistics stay as they are: accumulation moves them once, at the end.
    """

    def value(params, state, x, targets, number):
        call = home.training()
        if "rngs" in call:
            call["rngs"] = {"dropout": jax.random.fold_in(call["rngs"]["dropout"], number)}
        outputs, after = apply(home.model, join(params, state), x, **call)
        if isinstance(after, nnx.State):
            stats = nnx.filter_state(state, nnx.BatchStat)
            state = nnx.merge_state(split(after)[1], stats)
        return loss_of(home.network)(tuple(outputs), targets), state

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def assert_gradients(got, want):
    """The bias before a BatchNorm has a gradient of 0, and of rounding."""
    largest = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(want))
    near = lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-10 * max(largest, 1e-3))  # noqa: E731
    jax.tree.map(near, got, want)


def micro_batches(network):
    data = batches(network, 3)
    return data, np.random.default_rng(network.seed).normal(size=data.shape[:2])


def accumulated(function, home, data):
    loss = loss_of(home.network)
    step = jax.jit(lambda v: function(home.model, v, loss, data, **home.training()))
    return step(home.variables)


@seeds(4000, 1, 24)
def test_accumulated_is_the_mean(seed):
    """Of some a part is frozen."""
    network, rng = shown(seed, layers=(2, 5)), np.random.default_rng(seed)
    values, (data, targets) = draw(network), micro_batches(network)
    home, normalize, keep = one_home(network, values), set(), set()
    if seed % 2:
        normalize, (keep, kept) = some(network, rng)[0], some(network, rng)
        chosen = {"normalize": patterns(normalize), "keep": kept}
        print(home.name, "frozen", chosen)
        home = home._replace(model=freeze(home.model, home.variables, **chosen))
    value, gradients, after = accumulated(accumulate, home, (data, targets))
    runs = runs_of(network, values, data, inference=normalize, kept=keep)
    step, (params, state), found = ordinary_step(home), split(home.variables), []
    for number, (x, t) in enumerate(zip(data, targets, strict=True)):
        (one, state), each = step(params, state, x, t, number)
        found.append((one, each))
    want = jax.tree.map(lambda *v: sum(v) / len(v), *found)
    np.testing.assert_allclose(value, want[0], rtol=1e-9)
    assert_gradients(gradients, want[1])
    assert_variables(after, moved(network, values, runs, keep))


@seeds(5000, 1, 20)
def test_accumulated_exactly_is_the_big_batch(seed):
    network = shown(seed, layers=(2, 4), dropout=False)
    values, (data, targets) = draw(network), micro_batches(network)
    home = one_home(network, values)
    value, gradients, after = accumulated(accumulate_exactly, home, (data, targets))
    big = data.reshape(-1, *data.shape[2:])
    (one, _), want = ordinary_step(home)(*split(home.variables), big, targets.ravel(), 0)
    np.testing.assert_allclose(value, one, rtol=1e-9)
    assert_gradients(gradients, want)
    assert_variables(after, run(network, values, big, train=True).variables)


# Diagnosis ---------------------------------------------------------------------------------

CHECKED = {
    "nonfinite", "replicas_disagree", "training_mode_in_evaluation", "never_updated",
    "train_evaluation_gap", "stale", "too_few_elements", "dead_features", "low_variance",
}  # fmt: skip


FAULTS = {"var": (-0.1, np.nan), "mean": (np.inf,), "kernel": (np.nan, -np.inf), "scale": (0,)}


def healthy(seed):
    """A network with the statistics of its batch; the values, the batch, and what it did."""
    network = shown(seed, sharing=False, dropout=False, repeats=False)
    values, (x,) = draw(network), batches(network, 1)
    ran = run(network, values, x, train=True, kept=network.norms())
    return network, values | population(network, [ran], network.trained()), x, ran


def called_for(ran):
    """(kind, path) of the findings that the elements of the batch call for."""
    for path, node, rows in ran.seen:
        var, epsilon = rows.var(0), node.settings["epsilon"]
        dead = var <= (1e-14 * np.abs(rows).max(0)) ** 2
        said = {
            "too_few_elements": len(rows) < 16 and not node.settings["fixed"],
            "dead_features": dead.any(),
            "low_variance": (~dead & (var < 10 * epsilon)).any(),
        }
        yield from ((kind, path) for kind, is_so in said.items() if is_so)


def diagnosed(network, values, x):
    home = one_home(network, values)
    found = diagnose(home.model, home.variables, x)
    print(*found, sep="\n")
    return [(f.kind, f.path) for f in found]


@seeds(6000, 1, 20)
def test_a_healthy_network(seed):
    network, values, x, ran = healthy(seed)
    found = diagnosed(network, values, x)
    assert {f for f in found if f[0] in CHECKED} == set(called_for(ran))


@seeds(6500, 2, 24)
def test_a_planted_fault_is_named(seed):
    network, values, x, _ = healthy(seed)
    rng = np.random.default_rng(seed)
    faults = [(place, v) for place in values for v in FAULTS.get(place[1], ())]
    (path, leaf), value = faults[rng.integers(len(faults))]
    values[path, leaf] = values[path, leaf].copy()
    values[path, leaf].flat[0] = value
    print(f"{value} in {leaf} of {path}")
    kind = "dead_features" if value == 0 else "nonfinite"
    assert (kind, path) in diagnosed(network, values, x)
