"""Shuffling and batching on the device, as a pure function of a run's key."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax


def batch_indices(
    key: jax.Array, first_step: jax.Array, num_steps: int, num_examples: int, batch_size: int
) -> jax.Array:
    """Which examples the steps first_step .. first_step + num_steps - 1 train on.

    Every epoch is a fresh permutation, `permutation(fold_in(key, epoch))`, cut into
    batches; the last num_examples % batch_size examples of it are left out. The order
    depends on the key and the step alone, so a run can be continued at any step.

    Args:
      key: of the run.
      first_step: int32 `[]`, a multiple of num_steps; may be traced.
      num_steps, num_examples, batch_size: static.

    Returns:
      int32 `[num_steps, batch_size]`.

    Raises:
      ValueError: batch_size is larger than num_examples.
    """
    per_epoch = num_examples // batch_size
    if per_epoch == 0:
        raise ValueError(f"a batch of {batch_size} from {num_examples} examples")
    # The latest that a multiple of num_steps can fall in an epoch is this. Sorting for a
    # permutation is a good part of a small network's time: none too many.
    latest = per_epoch - math.gcd(per_epoch, num_steps)
    epochs = -(-(latest + num_steps) // per_epoch)

    def one_epoch(epoch):
        order = permutation(jax.random.fold_in(key, epoch), num_examples)
        return order[: per_epoch * batch_size].reshape(per_epoch, batch_size)

    batches = jax.vmap(one_epoch)(first_step // per_epoch + jnp.arange(epochs))
    batches = batches.reshape(epochs * per_epoch, batch_size)
    return lax.dynamic_slice_in_dim(batches, first_step % per_epoch, num_steps)


def same_batch_indices(
    key: jax.Array, first_step: jax.Array, num_steps: int, num_examples: int, batch_size: int
) -> jax.Array:
    """As `batch_indices`, with every epoch in the order of the first: no fresh permutation."""
    per_epoch = num_examples // batch_size
    first = batch_indices(key, jnp.int32(0), per_epoch, num_examples, batch_size)
    return first[(first_step + jnp.arange(num_steps)) % per_epoch]


def permutation(key: jax.Array, n: int) -> jax.Array:
    """`jax.random.permutation(key, n)`, int32 `[n]`.

    On CPU some three times as fast (`benchmarks.tricks`): XLA's sort of one array there is much
    quicker than that of keys with values, so each key has its place in its lower half.
    """
    if jax.default_backend() != "cpu":
        return jax.random.permutation(key, n)
    order = jnp.arange(n, dtype=jnp.int32)
    # So many that equal keys of 32 bits do not matter, as JAX has it.
    for _ in range(math.ceil(3 * math.log(n) / math.log(2**32 - 1))):
        key, subkey = jax.random.split(key)
        bits = jax.random.bits(subkey, (n,))
        with jax.enable_x64(True):
            pairs = lax.convert_element_type(bits, jnp.uint64) << jnp.uint64(32)
            places = lax.sort(pairs | lax.iota(jnp.uint64, n), is_stable=False)
            places = lax.convert_element_type(places, jnp.uint32)  # the lower half
        order = order[places]
    return order
