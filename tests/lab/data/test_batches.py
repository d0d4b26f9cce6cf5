import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.lab.data import batch_indices, same_batch_indices
from bn_jax.lab.data.batches import permutation

KEY = jax.random.key(0)


@pytest.mark.long
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 15), st.integers(0, 6))
def test_any_stretch_is_cut_from_one_order(examples, batch, steps, stretches):
    batch, first = min(batch, examples), stretches * steps
    whole = batch_indices(KEY, 0, first + steps, examples, batch)
    part = batch_indices(KEY, first, steps, examples, batch)
    np.testing.assert_array_equal(part, whole[first:])


def test_an_epoch_sees_every_example_once_and_the_next_in_another_order():
    order = np.asarray(batch_indices(KEY, 0, 10, 20, 4))
    for epoch in (order[:5], order[5:]):
        assert sorted(epoch.ravel()) == list(range(20))
    assert (order[:5] != order[5:]).any()


def test_the_rest_of_an_epoch_is_left_out():
    order = np.asarray(batch_indices(KEY, 0, 2, 9, 4))
    assert len(set(order.ravel())) == 8


def test_every_epoch_in_the_order_of_the_first():
    first = batch_indices(KEY, 0, 5, 22, 4)
    found = jax.jit(lambda step: same_batch_indices(KEY, step, 7, 22, 4))
    for step in (0, 3, 11):
        np.testing.assert_array_equal(found(step), first[(step + np.arange(7)) % 5])


def test_order_depends_on_the_key():
    a, b = (batch_indices(jax.random.key(s), 0, 3, 30, 10) for s in (0, 1))
    assert (a != b).any()


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="a batch of 11 from 10 examples"):
        batch_indices(KEY, 0, 1, 10, 11)


@pytest.mark.parametrize("n", [1, 2, 7, 500, 3000])
def test_a_permutation_is_jaxs(n):
    """Two rounds of sorting from 1,626 on; alone, over keys, and in a loop."""
    keys = jax.vmap(jax.random.key)(np.arange(3))
    expected = np.stack([jax.random.permutation(key, n) for key in keys])
    found = jax.jit(jax.vmap(lambda key: permutation(key, n)))(keys)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    looped = jax.lax.map(lambda key: permutation(key, n), keys)
    np.testing.assert_array_equal(looped, expected)
