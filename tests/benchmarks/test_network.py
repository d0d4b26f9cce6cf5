"""What a step sends: held to compiled programs; its time: to sums by hand."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.network import FLOAT, describe, h100, sent, shared, tpu_v4
from bn_jax.core.sync import all_reduce
from bn_jax.lab.models import CNN, MLP
from bn_jax.linen import BatchNorm, GhostBatchNorm

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
    return describe(TINY(norm=BatchNorm), IMAGES.shape[1:])


def test_a_step_sends_what_is_said():
    expected = [(payload // FLOAT, True) for payload in tiny().norms()]
    expected.append((tiny().parameters, False))
    found = compiled("pmap", axis_index_groups=HALVES)
    assert sorted(found) == sorted(expected)


def test_ghost_groups_send_the_statistics_of_all_with_the_gradients():
    """8 examples in a group: those of 4 devices."""
    found = compiled("pmap", GhostBatchNorm, group_size=8)
    expected = [(payload // FLOAT, True) for payload in tiny().norms()]
    expected.append((tiny().parameters + tiny().running(8) // FLOAT, False))
    assert sorted(found) == sorted(expected)


def test_groups_are_slots_where_jax_has_nogrouped_sum():
    numbers = sum(count for count, _ in compiled("shard_map", axis_index_groups=HALVES))
    tiny_norms = sum(tiny().norms()) // FLOAT
    assert numbers == tiny().parameters + len(HALVES) * tiny_norms


def test_jit_sends_three_times_per_layer_too():
    """The mean of a sample, two sums; two sums of the backward pass, which are gradients."""
    counts = [count for count, _ in compiled("jit")]
    features = tiny().features
    assert len(counts) == 1 + 3 * len(features)
    expected = [count for c in features for count in (c, 2 * c, 2 * c)]
    gradients = tiny().parameters - 2 * sum(features)
    assert sorted(counts) == sorted([*expected, gradients])


def test_a_network_is_read_off_its_shapes():
    found = tiny()
    assert found.features == (3, 4)
    # A 3x3 kernel of 3 to 3 channels; dense 2 x 2 x 3 to 4, and 4 to 2; scales and biases.
    assert found.parameters == 81 + 12 * 4 + (4 * 2 + 2) + 2 * (3 + 4)
    assert found.norms() == [20, 12, 24, 24, 16, 32]


def test_flop_are_those_of_the_products():
    found = describe(MLP((512, 512), 10, norm=BatchNorm), (8, 8, 8))
    forward = 2 * (512 * 512 + 512 * 512 + 512 * 10)
    backward = 2 * forward - 2 * 512 * 512  # none for the images
    assert found.flop == pytest.approx(forward + backward, rel=0.02)


def test_seconds_of_nccl_by_hand():
    # Within a node, 4 chips: 6 steps of the small protocol at 19 GB/s.
    assert h100(8e3, 4) == pytest.approx(6.8e-6 + 6 * 0.6e-6 + 16e3 / 19e9)
    # 16 nodes: a tree has 7 steps in a node and 4 between nodes, up and down.
    tree = 2 * (7 + 4) * 28e-6 + 2e8 / (0.92 * 400e9)
    ring = 8.4e-6 + 222 * 3.4e-6 + 32 * 14e-6 + 2 * 127 / 128 * 1e8 / 400e9
    assert h100(1e8, 128) == pytest.approx(min(tree, ring))


def test_seconds_of_a_torus_by_hand():
    # 2 x 2 x 4, open: 1 + 1 + 3 hops, one link on each axis.
    assert tpu_v4(1e6, 16) == pytest.approx(2 * 5e-6 + 2 * 15 / 16 * 1e6 / (3 * 45e9))
    # 4 x 8 x 8, closed: 2 + 4 + 4 hops, two links.
    assert tpu_v4(1e6, 256) == pytest.approx(2 * 10e-6 + 2 * 255 / 256 * 1e6 / (6 * 45e9))


def test_a_pod_has_the_bandwidth_that_is_published():
    """Google Cloud: 1.1 PB/s for all-reduces on the 4,096 chips of a TPU v4 pod."""
    payload = 1e15  # no latency matters
    total = 4096 * sent(payload, 4096) / tpu_v4(payload, 4096)
    assert total == pytest.approx(1.1e15, rel=0.01)


def test_groups_have_128_examples():
    assert [shared(n) for n in (2, 8, 256, 4096)] == [2, 4, 4, 16]
