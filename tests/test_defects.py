"""D1 to D11: bn_jax is right on each case, by either layer; what its peers say is recorded."""

import numpy as np
import pytest

from experiments.defects import (
    FRAMEWORKS,
    Case,
    answer,
    by_default,
    defects,
    installed,
)
from experiments.defects.flax_layers import EPSILON, NNX, Linen
from experiments.defects.peers import load

CASES = [case for defect in defects() for case in defect.cases]
OURS = [case for case in CASES if "bn_jax" in case.measure]
# Of a number, relative to 1 or to the true value where that is larger. D4: half a unit in
# the last place of a bfloat16 between 2 and 4.
EXACT, EXACT_IN = 1e-6, {"D3": 1e-3, "D4": 2**-7}
STATS = np.zeros(4, np.float32), np.ones(4, np.float32)


def normal(*shape, mean=1.0, std=2.0):
    return np.random.default_rng(3).normal(mean, std, shape).astype(np.float32)


@pytest.mark.parametrize("layer", [Linen("bn_jax"), NNX("bn_jax")], ids=["linen", "nnx"])
@pytest.mark.parametrize("case", OURS, ids=lambda case: case.number)
def test_bn_jax_is_right(case, layer, monkeypatch):
    monkeypatch.setitem(FRAMEWORKS, "bn_jax", layer)
    given = answer(case, "bn_jax")
    assert given.right, given
    if isinstance(given.value, float):
        size = max(1, abs(case.true))
        assert abs(given.value - case.true) <= EXACT_IN.get(case.number, EXACT) * size


@pytest.fixture(scope="module", params=list(FRAMEWORKS))
def framework(request):
    """Each in turn, so that a process imports as few of them as can be."""
    if not installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    load(request.param)
    return request.param


def test_what_the_peers_say_is_recorded(framework, record_property):
    """Whether it is right is not asserted: a peer may have been mended."""
    for case in CASES:
        given = answer(case, framework)
        assert (given is None) == (framework not in case.measure)
        if given is not None:
            record_property(f"{case.number} {framework}", str(given.value))


def test_the_adapters_are_right_where_nobody_is_wrong(framework):
    """Else what is recorded as wrong could be a wrong use of the framework."""
    adapter, x = FRAMEWORKS[framework], normal(64, 4)
    trained = adapter.train([x] * 400, momentum=0.9)
    mean, var = np.mean(x, 0, np.float64), np.var(x, 0, np.float64)
    np.testing.assert_allclose(trained.y, (x - mean) / np.sqrt(var + EPSILON), 1e-4, 1e-4)
    np.testing.assert_allclose(trained.mean, mean, 1e-4)
    bessel = 64 / 63 if framework == "torch" else 1
    np.testing.assert_allclose(trained.var, bessel * var, 1e-4)
    once = adapter.train([x], momentum=0.99)
    np.testing.assert_allclose(adapter.restored(x, STATS), once.mean, 1e-5)
    if hasattr(adapter, "evaluate"):
        y = adapter.evaluate(x, np.float32(mean), np.float32(var))
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + EPSILON), 1e-4, 1e-4)
    if hasattr(adapter, "as_mask"):
        keep = np.arange(64) < 40
        masked = adapter.train([x], [adapter.as_mask(keep)], momentum=0.0)
        np.testing.assert_allclose(masked.mean, x[keep].mean(0), 1e-5)
    if hasattr(adapter, "replicas"):
        means = adapter.replicas(x.reshape(4, 16, 4), np.ones((4, 16, 1), bool))
        np.testing.assert_allclose(means, np.tile(mean, (4, 1)), 1e-5)


def test_the_layer_as_it_comes_is_where_the_page_says_so():
    """What the page tells against bn_jax is true: these three need more than the default."""
    given = {case.number: by_default(case) for case in CASES}
    wrong = {number for number, answer in given.items() if answer and not answer.right}
    assert wrong == {"D2a", "D2b", "D2c", "D7", "D10"}
    assert {number for number, answer in given.items() if answer} == wrong


@pytest.mark.parametrize("adapter", [Linen("flax"), NNX("flax")], ids=["linen", "nnx"])
def test_flax_without_the_fast_variance_is_right_as_the_note_on_d5_says(adapter):
    x = normal(1024, 4, mean=1e4, std=1)
    y = adapter.train([x], use_fast_variance=False).y
    np.testing.assert_allclose(np.std(y, 0, dtype=np.float64), 1, 1e-4)


@pytest.mark.parametrize("framework", ["keras"], indirect=True)
def test_keras_takes_a_mask_of_examples_as_the_note_on_d11_says(framework):
    x, keep = normal(4, 3, 5), np.array([[True], [True], [False], [True]])
    trained = FRAMEWORKS[framework].train([x], [keep], momentum=0.0, axis=1)
    np.testing.assert_allclose(trained.mean, x[keep[:, 0]].mean((0, 2)), 1e-5)


def made(measure, true=1.0, **fields):
    return Case("D0", "made", "nothing", true, 0.1, {"bn_jax": measure}, **fields)


def raising():
    raise KeyError("no")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (made(lambda: 1.05), (1.05, True, None)),
        (made(lambda: np.float32(1.5)), (1.5, False, None)),
        (made(lambda: np.float32("nan")), ("NaN", False, None)),
        (made(lambda: -np.inf), ("inf", False, None)),
        (made(lambda: "float32", "float32"), ("float32", True, None)),
        (made(lambda: "silent: a, b: c", "error"), ("silent", False, "a, b: c")),
        (made(raising, raises=True), ("error", False, "KeyError")),
        (made(raising, raises=True, or_refused=True), ("error", True, "KeyError")),
        (made(raising, "error", raises=True), ("error", True, "KeyError")),
    ],
)
def test_answers(case, expected):
    assert answer(case, "bn_jax") == expected
    assert answer(case, "torch") is None


def test_an_exception_where_none_is_an_answer_is_a_fault():
    with pytest.raises(KeyError):
        answer(made(raising), "bn_jax")


def test_cases_are_numbered_in_order_and_noted():
    assert [d.number for d in defects()] == [f"D{i}" for i in range(1, 12)]
    for defect in defects():
        numbers = [case.number for case in defect.cases]
        letters = [""] if len(numbers) == 1 else "abcdef"[: len(numbers)]
        assert numbers == [defect.number + letter for letter in letters]
        assert defect.title
        assert defect.note
