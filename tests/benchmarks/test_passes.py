"""Counting what a compiled program moves: by hand, and beside what XLA says of its own."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import passes
from bn_jax.errors import UserError

FUSED = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%fused (p: bf16[8,4], q: f32[4]) -> (bf16[8,4], pred[8,4]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %q = f32[4]{0} parameter(1)
  ROOT %t = (bf16[8,4]{1,0}, pred[8,4]{1,0}) tuple(%p, %p)
}

%sample (p: bf16[8,4]) -> f32[4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %s = bf16[2,4]{1,0} slice(%p), slice={[0:8:4], [0:4:1]}
  ROOT %r = f32[4]{0} reduce(%s), dimensions={0}, to_apply=%sum
}

ENTRY %main (x: bf16[8,4], v: f32[4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %v = f32[4]{0} parameter(1)
  %m = f32[4]{0} fusion(%x), kind=kInput, calls=%sample
  %f = (bf16[8,4]{1,0}, pred[8,4]{1,0}) fusion(%x, /*index=1*/%m), kind=kLoop, calls=%fused
  %y = bf16[8,4]{1,0} get-tuple-element(%f), index=0
  ROOT %z = bf16[8,4]{1,0} copy(%y), metadata={op_name="jit(f)/copy(x)"}
}
"""

# A copy to the chip, of which operations take nothing from main memory, and one back.
ON_CHIP = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %s = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)
  %d = f32[8]{0:T(128)S(1)} copy-done(%s)
  %w = ((f32[8]{0:T(128)}), f32[2]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2]}
  %e = f32[2]{0:T(128)S(1)} slice-done(%w)
  %a = f32[8]{0:T(128)S(1)} add(%d, %d)
  %b = (f32[8]{0:T(128)}, f32[8]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%a)
  ROOT %c = f32[8]{0:T(128)} copy-done(%b)
}
"""


def test_bytes_by_hand():
    x, half, mask, vector = 8 * 4 * 2, 2 * 4 * 2, 8 * 4, 4 * 4
    assert passes.moved(FUSED) == [half + vector, x + vector + x + mask, x + x]


def test_memory_on_the_chip_is_not_counted():
    assert [n for n in passes.moved(ON_CHIP) if n] == [32, 8, 32]


def test_a_compiled_program():
    """On a CPU, whose programs have the same lines."""
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    counted = passes.count(lambda x, y: jnp.sin(x) + y, (x, x), device)
    assert counted == passes.Counted(3 * 64 * 32 * 4, 0, 1)


THERE = {"v5e": "libtpu", "h200": "jax_plugins.xla_cuda12"}


def is_there(device):
    try:
        return importlib.util.find_spec(THERE[device]) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("device", THERE)
def test_a_package_that_is_not_there(device):
    if is_there(device):
        pytest.skip("it is there")
    with pytest.raises(UserError, match=rf'compiles for {device}.*: pip install "jax\[\w+\]"$'):
        passes.run(passes.Config(devices=(device,)))


@pytest.mark.parametrize("device", THERE)
def test_as_few_as_there_can_be(device):
    """Nothing but x and dy is read, each twice, nothing but y and dx written; Flax no less."""
    if not is_there(device):
        pytest.skip(f"compiles for no {device} here")
    shape = passes.Config().shapes[0]
    size = 2 * math.prod(map(int, shape.split("x")))
    found = passes.run(passes.Config(devices=(device,), shapes=(shape,)))
    for (*about, dtype, task, layer), counted in found.items():
        if layer == "bn_jax":
            least = {"forward": 3, passes.BLOCKS: math.inf, "masked fwd+bwd": 8}.get(task, 7)
            arrays = counted.moved / size / (2 if dtype == "float32" else 1)
            assert arrays < 1.01 * least, (dtype, task)
            assert counted.moved < 1.01 * found[*about, dtype, task, "flax fast"].moved
