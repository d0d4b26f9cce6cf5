"""What a step sends: held to compiled programs; its time: to sums by hand."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import network
from benchmarks.machines import H100, PROTOCOLS, TPU_V4, sent
from benchmarks.network import Assumptions, Step, project, projections
from benchmarks.payload import FLOAT, Network, describe
from bn_jax.core.sync import all_reduce
from bn_jax.errors import UserError
from bn_jax.linen import BatchNorm, GhostBatchNorm
from bn_jax.models import CNN, MLP

TINY = functools.partial(CNN, (3, 4), 2)
IMAGES = jnp.ones((16, 4, 4, 3))
HALVES = ((0, 1, 2, 3), (4, 5, 6, 7))


def found_in(program):
    """Of every all-reduce of a compiled program, how many numbers, and whether over halves."""
    return [
        (
            sum(
                math.prod(map(int, shape.split(",")))
                for shape in re.findall(r"f32\[([\d,]+)\]", result)
            ),
            "replica_groups={{0,1,2,3},{4,5,6,7}}" in rest,
        )
        for result, rest in re.findall(r"= (.*) all-reduce(?:-start)?\((.*)", program)
    ]


def compiled(engine, norm=BatchNorm, **fields):
    """Of a step on 8 devices: the gradients, summed over all, and the running statistics."""
    if engine != "jit":
        norm = functools.partial(norm, axis_name="batch", **fields)
    model = TINY(norm=norm)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), IMAGES
    )

    def step(variables, images):
        def loss(params):
            own = {**variables, "params": params}
            outputs, new = model.apply(own, images, train=True, mutable=["batch_stats"])
            return (outputs**2).mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
        return (all_reduce(gradients, "batch"), new) if engine == "pmap" else gradients

    if engine == "pmap":
        mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0))
        return found_in(
            mapped.lower(variables, IMAGES.reshape(8, 2, 4, 4, 3)).compile().as_text()
        )
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    if engine == "jit":
        shardings = (NamedSharding(mesh, P()), NamedSharding(mesh, P("batch")))
        step = jax.jit(step, in_shardings=shardings, out_shardings=shardings[0])
    else:
        step = jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
        )
    return found_in(step.lower(variables, IMAGES).compile().as_text())


def tiny():
    return describe("tiny", TINY(norm=BatchNorm), IMAGES.shape[1:])


def test_a_step_sends_what_is_said():
    expected = [(payload // FLOAT, True) for payload in tiny().norms()]
    expected.append((tiny().gradients() // FLOAT, False))
    found = compiled("pmap", axis_index_groups=HALVES)
    assert sorted(found) == sorted(expected)


def test_ghost_groups_send_the_statistics_of_all_with_the_gradients():
    """8 examples in a group: those of 4 devices."""
    found = compiled("pmap", GhostBatchNorm, group_size=8)
    expected = [(payload // FLOAT, True) for payload in tiny().norms()]
    expected.append(((tiny().gradients() + tiny().running(8)) // FLOAT, False))
    assert sorted(found) == sorted(expected)


def test_groups_are_slots_where_jax_has_nogrouped_sum():
    numbers = sum(count for count, _ in compiled("shard_map", axis_index_groups=HALVES))
    tiny_norms = sum(tiny().norms()) // FLOAT
    assert numbers == tiny().gradients() // FLOAT + len(HALVES) * tiny_norms


def test_jit_sends_three_times_per_layer_too():
    """The mean of a sample, two sums; two sums of the backward pass, which are gradients."""
    counts = [count for count, _ in compiled("jit")]
    features = tiny().features
    assert len(counts) == 1 + 3 * len(features)
    expected = [count for c in features for count in (c, 2 * c, 2 * c)]
    gradients = tiny().gradients() // FLOAT - 2 * sum(features)
    assert sorted(counts) == sorted([*expected, gradients])


def test_a_network_is_read_off_its_shapes():
    found = tiny()
    assert found.features == (3, 4)
    # A 3x3 kernel of 3 to 3 channels; dense 2 x 2 x 3 to 4, and 4 to 2; scales and biases.
    assert found.parameters == 81 + 12 * 4 + (4 * 2 + 2) + 2 * (3 + 4)
    assert found.norms() == [16, 12, 24, 20, 16, 32]


def test_flop_are_those_of_the_products():
    found = describe("dense", MLP((512, 512), 10, norm=BatchNorm), (8, 8, 8))
    forward = 2 * (512 * 512 + 512 * 512 + 512 * 10)
    backward = 2 * forward - 2 * 512 * 512  # none for the images
    assert found.flop == pytest.approx(forward + backward, rel=0.02)


def test_bytes_sent_by_each_chip():
    assert sent(100, 2) == 100
    assert sent(100, 4) == 150


def test_seconds_of_nccl_by_hand():
    ring, tree, small = PROTOCOLS
    # 6 steps within a node; 3/4 of 8 kB, twice, at 450 GB/s.
    assert ring.seconds(8e3, 4, 1, 450e9) == pytest.approx(8.4e-6 + 6 * 3.4e-6 + 12e3 / 450e9)
    # 16 nodes: 7 steps in a node and 4 from node to node, up and down.
    both = 2 * (7 + 4) * 28e-6 + 2e8 / (0.92 * 400e9)
    assert tree.seconds(1e8, 128, 16, 400e9) == pytest.approx(both)
    # 254 steps around, of which 32 from node to node.
    around = 8.4e-6 + 222 * 3.4e-6 + 32 * 14e-6 + 2 * 127 / 128 * 1e8 / 400e9
    assert ring.seconds(1e8, 128, 16, 400e9) == pytest.approx(around)
    few = 6.8e-6 + 6 * 0.6e-6 + 16e3 / 19e9
    assert small.seconds(8e3, 4, 1, 450e9) == pytest.approx(few)
    assert H100.all_reduce(8e3, 4) == pytest.approx(few)
    assert H100.all_reduce(1e8, 128) == pytest.approx(min(both, around))


def test_seconds_of_a_torus_by_hand():
    assert TPU_V4.sides(8) == (2, 2, 2)
    assert TPU_V4.sides(16) == (2, 2, 4)
    assert TPU_V4.sides(256) == (4, 8, 8)
    # Open: 1 + 1 + 3 hops, one link on each axis. Closed: 2 + 4 + 4, two links.
    opened = 2 * 5e-6 + 2 * 15 / 16 * 1e6 / (3 * 45e9)
    assert TPU_V4.all_reduce(1e6, 16) == pytest.approx(opened)
    closed = 2 * 10e-6 + 2 * 255 / 256 * 1e6 / (6 * 45e9)
    assert TPU_V4.all_reduce(1e6, 256) == pytest.approx(closed)


def test_a_pod_has_the_bandwidth_that_is_published():
    """Google Cloud: 1.1 PB/s for all-reduces on the 4,096 chips of a TPU v4 pod."""
    payload = 1e15  # no latency matters
    total = 4096 * sent(payload, 4096) / TPU_V4.all_reduce(payload, 4096)
    assert total == pytest.approx(1.1e15, rel=0.01)


# The axes of a torus are closed from 64 chips on, which then take fewer hops than 32.
@pytest.mark.parametrize(
    ("machine", "powers"), [(H100, range(13)), (TPU_V4, range(6)), (TPU_V4, range(6, 13))]
)
def test_small_sums_take_longer_the_more_share(machine, powers):
    seconds = [machine.all_reduce(4e3, 2**i) for i in powers]
    assert seconds == sorted(set(seconds))
    assert machine.all_reduce(4e3, 1) == 0


def test_groups_have_128_examples():
    assumed = Assumptions()
    assert [assumed.examples(n) for n in (8, 256, 4096)] == [32, 32, 8]
    assert [assumed.group(n) for n in (2, 8, 256, 4096)] == [2, 4, 4, 16]
    assert assumed._replace(examples_per_chip=200).group(8) == 1
    # 6 would have 126 examples, and do not divide 8.
    assert assumed._replace(examples_per_chip=21).group(8) == 4


def test_a_step_is_its_parts():
    """Of chips with 1 TFLOP/s, and all-reduces of 1 s per byte and other chip."""

    class Machine:
        peak = 1e12

        def all_reduce(self, payload, chips):
            return payload * (chips - 1)

    net = Network("two layers", 10, (1, 3), 1e9)
    some = functools.partial(project, net, Machine(), 4, examples=50, utilisation=0.5)
    norms, running = 4 * (2 + 1 + 2 + 4 + 3 + 6), 4 * 4 * (3 + 7)
    compute = 50 * 1e9 / 0.5e12
    assert some(group=2) == Step(compute, 3 * 40, norms, 3 * running)
    assert some(group=4) == Step(compute, 3 * 40, 3 * norms, 0)
    assert some(group=1) == Step(compute, 3 * 40, 0, 3 * running)


def test_utilisation_is_the_published_throughput():
    # 1.05e6 images/s of 24 GFLOP, by 1,024 chips of 123 TFLOP/s.
    assert Assumptions().utilisation(24e9) == pytest.approx(0.2001, rel=1e-3)


def test_the_table_has_every_case(monkeypatch, capsys):
    model = TINY(norm=BatchNorm), IMAGES.shape[1:]
    monkeypatch.setattr(network, "MODELS", {"ResNet-50": model, "other": model})
    rows = network.run(network.Config(models=("other",), chips=(8, 16384)))
    shared = {(row["machine"], row["chips"], row["group"]) for row in rows}
    groups = ((8, 1), (8, 4), (8, 8), (16384, 1), (16384, 64), (16384, 16384))
    assert shared == {(machine.name, *g) for machine in (H100, TPU_V4) for g in groups}
    assert all(row["norms"] > 0 for row in rows if row["group"] > 1)
    printed = capsys.readouterr().out
    assert printed.count("| DGX H100 ") == printed.count("| TPU v4 ") == len(groups)
    assert printed.count("**64**") == 2  # of 2 examples


def test_the_recommended_are_marked():
    rows = projections(tiny(), (8, 4096), 0.2, Assumptions())
    marked = [(row["chips"], row["group"]) for row in rows if row["recommended"]]
    assert marked == 2 * [(8, 4), (4096, 16)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"models": ("vgg",)}, "--models: 'vgg' is none of ResNet-50, BN-Inception, CifarA"),
        ({"chips": (8, 12)}, "--chips: 12 is none of 2, 4, 8"),
        ({"chips": (1,)}, "--chips: 1 is none of 2, 4, 8"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        network.Config(**flags)
