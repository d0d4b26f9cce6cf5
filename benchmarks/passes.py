"""What a BatchNorm moves on a GPU and a TPU: passes over its array, which need neither.

XLA compiles for devices that are not there, and what a kernel reads and writes in the device's
memory can be read off the compiled program. A BatchNorm does so little with each number that
these passes are its time, unless the array fits a cache. The tasks are those of
`benchmarks.layer`, and `two blocks`, the gradient of two convolutions of 3 x 3, each with
BatchNorm and ReLU, where XLA may take sums and maps into the convolutions. (With a forward and
a backward pass in one program, y and the sums of the backward pass can be computed in one go:
that makes 7 passes of 8.)

`without` is bn_jax without one of the things that it does for such devices: in `two blocks`
sums of x where means are near 0, which XLA takes into the convolution on a TPU, as it does not
sums about a shift; with ReLU a mask that is computed for each pass that has use for it, and not
stored on a GPU. `stored` is temporary memory of bn_jax and of Flax's fast BatchNorm (on a TPU
room for a copy, which is made only where means are far from 0). All are in units of the array.
An H200 has a cache of 50 MB: of arrays that fit there XLA stores more of what it could compute
again, for ours as for Flax's.

The devices are an H200 (`pip install "jax[cuda12]"`) and a TPU v5e (`pip install "jax[tpu]"`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

# The packages of a device look for it, and complain.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks import contestants
from benchmarks.contestants import BOTH_WITH_RELU
from benchmarks.hlo import moved
from benchmarks.layer import BASELINE, DTYPES, OURS, sizes
from benchmarks.machine import describe_machine
from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import flag
from bn_jax.lab.report.markdown import table
from bn_jax.linen import BatchNorm

# What XLA's compiler asks of a GPU, as it has it for the H200
# (xla/backends/gpu/target_config/specs/h200.txtpb).
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  device_memory_size: 151397597184  memory_bandwidth: 4800000000000  l2_cache_size: 52428800
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
}
"""
BLOCKS = "two blocks"
WITHOUT = "without"
LAYERS = (OURS, BASELINE, "flax stable", WITHOUT)


class Target(NamedTuple):
    """A device that programs are compiled for: what to ask JAX for, and the package for it."""

    backend: str
    platform: str
    topology: str
    options: dict[str, str]
    package: str

    def sharding(self) -> SingleDeviceSharding:
        """On one such device; a UserError if the package is not there."""
        try:
            found = topologies.get_topology_desc(self.topology, self.platform, **self.options)
        except (NotImplementedError, RuntimeError) as e:
            what = f"{self.topology} ({str(e).splitlines()[0]})"
            raise UserError(
                f'nothing here compiles for {what}: pip install "{self.package}"'
            ) from e
        return SingleDeviceSharding(found.devices[0])


_CUDA = {"target_config": H200, "topology": "1x1x1"}
TARGETS = {
    "h200": Target("gpu", "cuda", "h200", _CUDA, "jax[cuda12]"),
    "v5e": Target("tpu", "tpu", "v5e:2x2", {}, "jax[tpu]"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.passes --help`."""

    devices: tuple[str, ...] = flag(tuple(TARGETS), f"of {', '.join(TARGETS)}")
    # The first is larger than a TPU's memory on the chip, where XLA would keep it. The others
    # are of ResNet-50's first and second stage.
    shapes: tuple[str, ...] = flag(
        ("1024x32x32x128", "256x56x56x64", "256x28x28x128"), "of the array, features last"
    )
    dtypes: tuple[str, ...] = flag(("float32", "bfloat16"), f"of {', '.join(DTYPES)}")

    def __post_init__(self):
        for name in self.devices:
            if name not in TARGETS:
                raise UserError(f"--devices={name}: choose from {', '.join(TARGETS)}")


class Counted(NamedTuple):
    """Of a compiled program: bytes that it moves, bytes of temporaries, its operations."""

    moved: int
    stored: int
    kernels: int


def run(config: Config) -> dict[tuple[str, ...], Counted]:
    """Prints a table for each device and shape.

    The counts come back, by device, shape, dtype, task and layer.
    """
    print(describe_machine("flax", "libtpu", "jax-cuda12-plugin"))
    found = {}
    for name, shape in itertools.product(config.devices, config.shapes):
        sharding, rows = TARGETS[name].sharding(), []
        for dtype in config.dtypes:
            x = jax.ShapeDtypeStruct(sizes(shape), dtype)
            with mock.patch.object(jax, "default_backend", return_value=TARGETS[name].backend):
                for task, layers in counts(x, sharding).items():
                    cells = [(layers.get(n), "moved") for n in LAYERS]
                    cells += [(layers[n], "stored") for n in (OURS, BASELINE)]
                    size = x.size * x.dtype.itemsize
                    said = [f"{getattr(c, what) / size:.2f}" if c else "" for c, what in cells]
                    rows.append([dtype, task, *said])
                    found |= {(name, shape, dtype, task, n): c for n, c in layers.items()}
        print(f"\n**{name}, {shape}**\n")
        print(table(["", "passes", *LAYERS, "stored", "flax fast"], rows))
    return found


# By task: the function that decides what is done for such devices, and what it says else.
VARIANTS = {
    BLOCKS: ("bn_jax.core.moments._raw_sums_first", ()),
    BOTH_WITH_RELU.name: ("bn_jax.core.batch_norm._one_mask", ("cuda", "tpu")),
}


def counts(
    x: jax.ShapeDtypeStruct, sharding: SingleDeviceSharding
) -> dict[str, dict[str, Counted]]:
    """Of every task, the layers as they are, and bn_jax without what is in `VARIANTS`."""
    found: dict[str, dict[str, Counted]] = {}
    for task, layer, f, arguments in programs(x):
        layers = found.setdefault(task, {})
        layers[layer] = count(f, arguments, sharding)
        if layer == OURS and task in VARIANTS:
            name, says = VARIANTS[task]
            with mock.patch(name, return_value=says):
                # Another function, or JAX would know the program already.
                layers[WITHOUT] = count(functools.partial(f), arguments, sharding)
    return found


def programs(x: jax.ShapeDtypeStruct) -> Iterator[tuple[str, str, Callable, tuple]]:
    """Task, layer, the function and its arguments."""
    variables = contestants.initial(x.shape[-1])
    for task in contestants.TASKS:
        for layer, apply in contestants.layers(task, x.dtype).items():
            if task.backward:
                f = functools.partial(contestants.forward_backward, apply)
                yield task.name, layer, f, (*variables, x, x)
            else:
                yield task.name, layer, apply, (*variables, x)
    for layer, norm in {OURS: BatchNorm, BASELINE: nn.BatchNorm}.items():
        blocks = Blocks(norm, x.dtype)
        shapes = jax.eval_shape(blocks.init, jax.random.key(0), x)
        yield BLOCKS, layer, functools.partial(gradient, blocks), (shapes, x)


class Blocks(nn.Module):
    """Convolution, BatchNorm, ReLU, twice."""

    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            conv = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype)
            x = nn.relu(self.norm(use_running_average=False, dtype=self.dtype)(conv(x)))
        return x


def gradient(model: nn.Module, variables: Any, x: jax.Array) -> tuple[Any, Any]:
    """Of the mean square of the output by the parameters, and the new statistics."""

    def loss(params):
        y, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.mean(y.astype(jnp.float32) ** 2), new

    return jax.grad(loss, has_aux=True)(variables["params"])


def count(f: Callable, arguments: tuple, sharding: SingleDeviceSharding) -> Counted:
    """f, compiled for the device of the sharding."""
    there = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), arguments
    )
    program = jax.jit(f, out_shardings=sharding).lower(*there).compile()
    kernels = [n for n in moved(program.as_text()) if n]
    return Counted(sum(kernels), program.memory_analysis().temp_size_in_bytes, len(kernels))


if __name__ == "__main__":
    flags.main(Config, run)
