"""A function of a batch over several devices, a part of the examples on each.

n devices give what one gives: sums over examples are sums over devices too. Batches that
the devices do not divide are filled up with examples that are masked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "batch"
MODES = ("pmap", "jit", "shard_map")


def batch_mesh(devices: int | None = None) -> Mesh:
    """So many devices along one axis; by default all, of all processes."""
    some = jax.devices()[:devices]
    return jax.make_mesh((len(some),), (AXIS,), axis_types=(AxisType.Auto,), devices=some)


def over_devices(
    f: Callable, mode: str, mesh: Mesh, divided: Sequence[bool], donate: Sequence[int] = ()
) -> Any:
    """f over the devices of a mesh, as something to call or to lower.

    Args:
      f: of arrays, and of `axis_name`: a name under pmap and shard_map, where f sees the
        examples of one device and sums over the name; None under jit, where it sees all and
        the compiler divides the work. What it returns is the same on every device.
      mode: pmap, jit or shard_map.
      mesh: of `batch_mesh`.
      divided: for each argument, whether devices have different parts of it, as `divide`
        makes them, or the same, as `replicate` has it.
      donate: numbers of the arguments whose memory the result may take.
    """
    per_device = functools.partial(f, axis_name=AXIS)
    if mode == "pmap":
        return jax.pmap(
            per_device, AXIS, in_axes=tuple(0 if d else None for d in divided),
            out_axes=None, devices=list(mesh.devices.flat), donate_argnums=tuple(donate),
        )  # fmt: skip
    specs = tuple(P(AXIS) if d else P() for d in divided)
    if mode == "shard_map":
        inner = _each(per_device, divided, lambda v: v[0])
        inner = jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P())
    else:
        joined = functools.partial(f, axis_name=None)
        inner = _each(joined, divided, lambda v: v.reshape(-1, *v.shape[2:]))
    shardings = tuple(NamedSharding(mesh, s) for s in specs)
    return jax.jit(
        inner, in_shardings=shardings, out_shardings=NamedSharding(mesh, P()),
        donate_argnums=tuple(donate),
    )  # fmt: skip


def _each(f, divided, change):
    def g(*args):
        pairs = zip(args, divided, strict=True)
        return f(*(jax.tree.map(change, a) if d else a for a, d in pairs))

    return g


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process has whole, as the sharding lays them out over all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(functools.partial(_put, sharding), tree)


def _put(sharding, v):
    v = v if isinstance(v, np.ndarray) else jnp.asarray(v)
    if isinstance(v, jax.Array) and v.sharding.is_equivalent_to(sharding, v.ndim):
        return v
    if jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
        data = _put(sharding, jax.random.key_data(v))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(v))
    whole = np.asarray(v)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The arrays on every device of the mesh."""
    return put(tree, NamedSharding(mesh, P()))


def divide(tree: Any, mesh: Mesh) -> Any:
    """Arrays `[n, ...]` as `[devices, n / devices, ...]`, a row on each device."""
    parts = jax.tree.map(lambda v: v.reshape(mesh.size, -1, *v.shape[1:]), tree)
    return put(parts, NamedSharding(mesh, P(AXIS)))


def spread(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """This process's rows `[n, ...]` of a batch on its devices, filled up with 0 for these."""
    missing = -len(rows) % jax.local_device_count()
    rows = np.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)])
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXIS)), rows)


def varying(tree: Any, axis_name: str | None) -> Any:
    """The tree, to be differentiated with respect to by every device for itself.

    Of arrays that are the same on all devices `shard_map` sums the gradients, `pmap` does not.
    """
    if axis_name is None:
        return tree
    return jax.tree.map(lambda v: lax.pcast(v, axis_name, to="varying"), tree)
