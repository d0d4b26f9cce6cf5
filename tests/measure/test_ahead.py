"""Orders that are begun ahead are those that would be computed when they are wanted."""

import threading

import numpy as np
import pytest

from bn_jax.measure import Point
from bn_jax.measure.ahead import Ahead
from bn_jax.measure.grid import chunks

POINTS = [Point(0.1, 1.0, None), Point(0.2, 1.0, None)]


class Order:
    """Numbers that tell which chunk and step they belong to; remembers what it was asked."""

    def __init__(self):
        self.asked, self.threads = [], set()

    def __call__(self, chunk, first_step):
        self.asked.append((chunk.points[0].learning_rate, int(first_step)))
        self.threads.add(threading.current_thread())
        if first_step == 6:
            raise MemoryError("step 6")
        return np.array([chunk.points[0].learning_rate, first_step])


@pytest.fixture
def two():
    return list(chunks(POINTS, [0], 1))


def test_is_what_was_asked_for_whatever_was_begun(two):
    order = Order()
    ahead = Ahead(order, 2, 6)
    for chunk, step in ((0, 0), (0, 2), (0, 4), (1, 0), (0, 2), (1, 2), (1, 0), (1, 0)):
        rate = two[chunk].points[0].learning_rate
        np.testing.assert_array_equal(ahead(two[chunk], step), [rate, step])


def test_begins_the_next_in_another_thread_and_nothing_past_the_end(two):
    order = Order()
    ahead = Ahead(order, 2, 6)
    for step in (0, 2, 4):
        ahead(two[0], step)
    assert order.asked == [(0.1, 0), (0.1, 2), (0.1, 4)]
    assert len(order.threads) == 1
    assert threading.current_thread() not in order.threads


def test_a_failure_is_that_of_the_call_that_wanted_it(two):
    ahead = Ahead(Order(), 2, 10)
    ahead(two[0], 4)
    with pytest.raises(MemoryError, match="step 6"):
        ahead(two[0], 6)
    np.testing.assert_allclose(ahead(two[0], 8), [0.1, 8])


def test_no_thread_where_no_core_is_left(two):
    order = Order()
    ahead = Ahead(order, 2, 6, beside=False)
    for chunk, step in ((0, 0), (1, 0), (0, 2)):
        rate = two[chunk].points[0].learning_rate
        np.testing.assert_array_equal(ahead(two[chunk], step), [rate, step])
    assert order.asked == [(0.1, 0), (0.2, 0), (0.1, 2)]
    assert order.threads == {threading.current_thread()}


def test_no_thread_where_programs_are_queued(two, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    order = Order()
    np.testing.assert_allclose(Ahead(order, 2, 6)(two[0], 2), [0.1, 2])
    assert order.asked == [(0.1, 2)]
    assert order.threads == {threading.current_thread()}
