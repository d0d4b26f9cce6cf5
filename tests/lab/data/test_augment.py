"""What augmentation does to images: never more than it says, and to each its own."""

import jax
import numpy as np
import pytest

from bn_jax.lab.data import AUGMENTATIONS, augmentation

IMAGES = np.random.default_rng(0).normal(size=(64, 10, 20, 3)).astype(np.float32)


def augmented(name):
    return np.asarray(jax.jit(AUGMENTATIONS[name])(jax.random.key(0), IMAGES))


def test_flip_mirrors_about_half_and_leaves_the_rest():
    found = augmented("flip")
    same = (found == IMAGES).all((1, 2, 3))
    mirrored = (found == IMAGES[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_shift_is_one_of_the_fifteen_moves():
    found = augmented("shift")
    moves = set()
    for image, original in zip(found, IMAGES, strict=True):
        fitting = [
            (down, right)
            for down in (-1, 0, 1)
            for right in (-2, -1, 0, 1, 2)
            if (image == moved(original, down, right)).all()
        ]
        assert len(fitting) == 1
        moves |= set(fitting)
    assert len(moves) > 8


def moved(image, down, right):
    rows = np.clip(np.arange(10) - down, 0, 9)
    columns = np.clip(np.arange(20) - right, 0, 19)
    return image[rows][:, columns]


def test_distort_is_an_affine_map_of_each_image():
    found = augmented("distort")
    slopes = []
    for image, original in zip(found, IMAGES, strict=True):
        slope, level = np.polyfit(original.ravel(), image.ravel(), 1)
        np.testing.assert_allclose(image, slope * original + level, atol=1e-5)
        slopes.append(slope)
        assert abs(image.mean() - original.mean()) <= 0.3 * original.std() + 1e-5
    assert 0.7 <= min(slopes) < 0.8
    assert 1.2 < max(slopes) <= 1.3


def test_several_are_done_in_turn_with_keys_of_their_own():
    key = jax.random.key(3)
    both = augmentation(("flip", "shift"))(key, IMAGES)
    first, second = jax.random.split(key)
    by_hand = AUGMENTATIONS["shift"](second, AUGMENTATIONS["flip"](first, IMAGES))
    np.testing.assert_array_equal(both, by_hand)
    assert augmentation(()) is None


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_key_decides(name):
    other = np.asarray(jax.jit(AUGMENTATIONS[name])(jax.random.key(1), IMAGES))
    np.testing.assert_array_equal(augmented(name), augmented(name))
    assert (augmented(name) != other).any()
