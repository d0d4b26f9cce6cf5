"""How far outputs are apart: by their own scale, and what cannot be compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.surgery.compare import array_leaves, comparable, difference, noise, perturb, widen

RNG = np.random.default_rng(0)


def apart(old, new, tolerance=1e-3, elementwise=False):
    return difference([old], [new], tolerance=tolerance, elementwise=elementwise)


def test_each_feature_has_its_own_scale():
    old = RNG.normal(size=(6, 3)) * [1e5, 1, 1e-5]
    old /= np.abs(old).max(0) / [1e5, 1, 1e-5]
    for feature, scale in enumerate([1e5, 1, 1e-5]):
        new = old.copy()
        new[3, feature] += 0.3 * scale
        assert apart(old, new) == pytest.approx(0.3)


def test_each_element_has_its_own_scale_of_all_inputs():
    old = [np.array([[1e5, 1.0, 0.0]]), np.array([[1.0, 1e-3, 2.0]])]
    new = [old[0] + [[0, 1e-3, 0]], old[1] + [[0, 0, 0.5]]]
    given = {"tolerance": 1e-6, "elementwise": True}
    assert difference(old, old, **given) == 0
    assert difference(old, new, **given) == pytest.approx(0.25)
    assert difference(old[:1], new[:1], **given) == pytest.approx(1e-3)


def test_rounding_of_the_largest_is_no_difference():
    old = np.float32([[1e6, 1e-6]])
    assert apart(old, old + np.float32([[0, 1e-3]])) < 1e-3
    assert apart(old.astype(np.float64), old + np.float64([[0, 1e-3]])) > 1e-3


CASES = {
    "equal infinities": (np.array([1, np.inf]), np.array([1, np.inf]), 0),
    "other infinities": (np.array([1, np.inf]), np.array([1, -np.inf]), np.inf),
    "NaN in both": (np.array([1, np.nan]), np.array([1, np.nan]), 0),
    "NaN in one": (np.array([1, 2.0]), np.array([1, np.nan]), np.inf),
    "NaN in all of one": (np.array([1, 2.0]), np.full(2, np.nan), np.inf),
    "zeros": (np.zeros(3), np.zeros(3), 0),
    "of zeros": (np.zeros(3), np.full(3, 1e-12), 1e-15 / (4 * 2**-52)),
    "integers": (np.arange(4), np.array([0, 1, 2, 4]), 0.25),
    "bools": (np.array([True, False]), np.array([True, True]), 0.5),
    "keys": (jax.random.key(1), jax.random.key(2), 0.5),
    "strings": ("a", "b", np.inf),
    "empty": (np.zeros((0, 3)), np.zeros((0, 3)), 0),
    "bfloat16": (jnp.bfloat16([1, 2]), jnp.bfloat16([1, 2.5]), 0.25),
    "complex": (np.array([3 + 4j]), np.array([3 + 4.5j]), 0.1),
    "nothing": ([], [], 0),
}


@pytest.mark.parametrize(("old", "new", "want"), CASES.values(), ids=CASES)
def test_kinds_of_outputs(old, new, want):
    assert apart(old, old) == 0
    assert apart(old, new) == pytest.approx(want)


def test_what_can_be_compared():
    assert comparable({"y": jnp.array([1, -jnp.inf]), "key": jax.random.key(0)})
    assert comparable((jnp.ones(2), jnp.full(2, jnp.inf), jnp.zeros(0)))
    assert comparable(None)
    assert not comparable(jnp.array([1, jnp.nan]))
    assert not comparable(jnp.full(2, jnp.inf))
    assert not comparable((jnp.zeros((0, 2)), jnp.zeros(0, int)))


def test_what_the_model_makes_of_rounding_is_no_difference():
    old = RNG.normal(size=(6, 3))
    given = {"tolerance": 1e-6, "elementwise": True}
    assert difference([old], [1.001 * old], [old + 1e-9], **given) > 1e-4
    small, new = old * [1, 1e-6, 1e-6], old * [1, 1e-6, 1e-6] + 1e-10
    assert difference([small], [new], [small], **given) > 1e-6
    one = difference([small[:, 1:2]], [new[:, 1:2]], [small[:, 1:2] + 1e-9], **given)
    other = difference([small[:, 2:]], [new[:, 2:]], [small[:, 2:] + 1e-13], **given)
    assert one < 1e-6 < other


def test_perturbed_numbers():
    tree = {"w": jnp.ones(50, jnp.float32), "n": np.arange(3), "key": jax.random.key(0), "f": 1}
    moved = perturb(tree)
    assert set(np.unique(moved["w"] - tree["w"])) == {-(2.0**-17), 2.0**-17}
    assert moved["w"].dtype == jnp.float32
    assert moved["n"].tolist() == [0, 1, 2]
    assert moved["f"] == 1


def test_noise_has_the_range_of_the_sample():
    sample = {
        "x": jnp.asarray(RNG.normal(50, 3, (200, 40)), jnp.float32),
        "constant": jnp.zeros((200, 40), jnp.bfloat16),
        "tokens": jnp.arange(7) * 10,
        "complex": jnp.asarray(RNG.normal(size=(40, 40)) + 2j, jnp.complex64),
        "key": jax.random.key(3), "flag": True, "empty": jnp.zeros((0, 2)),
    }  # fmt: skip
    drawn = noise(sample)
    for name in ("x", "constant", "tokens", "complex", "empty"):
        assert drawn[name].dtype == sample[name].dtype
        assert drawn[name].shape == sample[name].shape
    for name, low, high in (("x", *map(float, (sample["x"].min(), sample["x"].max()))),
                            ("constant", -1, 1)):  # fmt: skip
        v = np.float64(drawn[name])
        assert low <= v.min() < low + 0.02 * (high - low)
        assert high >= v.max() > high - 0.02 * (high - low)
    assert float(jnp.abs(drawn["x"] - sample["x"]).mean()) > 2
    assert sorted(drawn["tokens"].tolist()) == sample["tokens"].tolist()
    assert 1 <= drawn["complex"].imag.min() < drawn["complex"].imag.max() <= 3
    assert drawn["flag"] is True
    jax.tree.map(np.testing.assert_array_equal, noise(sample)["x"], drawn["x"])


def test_widening_leaves_integers_and_keys():
    tree = {
        "w": jnp.ones(2, jnp.bfloat16),
        "n": jnp.arange(2),
        "key": jax.random.key(0),
        "f": 1.0,
    }
    with jax.enable_x64(True):
        wide = widen(tree)
    assert wide["w"].dtype == jnp.float64
    assert wide["n"] is tree["n"]
    assert len(array_leaves(wide)) == 4
