"""What is cut out of JPEG files, and how they are decoded."""

import io

import numpy as np
import pytest
import tiny_imagenet as tiny
from PIL import Image
from scipy import stats

from bn_jax.lab.data import images


@pytest.mark.parametrize(("width", "height"), [(144, 96), (96, 144), (96, 96)])
def test_the_centre_is_cut_out(width, height):
    """As the usual recipe has it: the shorter side becomes 8/7 of the size; then crop."""
    encoded, size = tiny.jpeg(tiny.picture(1, width, height, 0)), 56
    smaller = width * 2 // 3, height * 2 // 3
    left, upper = ((side - size) // 2 for side in smaller)
    whole = Image.open(io.BytesIO(encoded)).resize(smaller, Image.Resampling.BILINEAR)
    expected = whole.crop((left, upper, left + size, upper + size))
    found = images.for_evaluation(encoded, size)
    np.testing.assert_allclose(found, np.asarray(expected), atol=1)


def smooth(width, height):
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / width * a + y / height * b) for a, b in ((9, 2), (3, 7))]
    return np.stack([*waves, (x * 255 / width)], -1).astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(501, 377), (403, 1001), (1203, 905)])
def test_large_images_are_decoded_smaller_to_the_same(width, height):
    encoded = tiny.jpeg(smooth(width, height), quality=95)
    size, box = 40, (7, 120, 7 + width // 2, 120 + height // 2)
    whole = Image.open(io.BytesIO(encoded))
    expected = whole.resize((size, size), Image.Resampling.BILINEAR, box)
    found = images.decode(encoded, size, lambda *_: box)
    assert not np.array_equal(found, expected)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_become_rgb(mode):
    pixels = Image.fromarray(smooth(64, 64))
    expected = pixels.convert("L").convert("RGB") if mode == "L" else pixels
    encoded = tiny.jpeg(np.asarray(pixels), mode, quality=100, subsampling=0)
    assert Image.open(io.BytesIO(encoded)).mode == mode
    found = images.decode(encoded, 64, lambda *size: (0, 0, *size)).astype(int)
    # The loss of JPEG itself.
    assert np.abs(found - np.asarray(expected)).max() <= 6


def boxes(width, height, count=4000):
    rng = np.random.default_rng(0)
    return np.array([images.random_box(rng, width, height) for _ in range(count)]).T


def test_random_boxes_are_uniform_in_area_aspect_and_place():
    left, upper, right, lower = boxes(1000, 1000)
    across, down = right - left, lower - upper
    area = across * down / 1e6
    # Of up to 3/4 of a square's area every aspect fits, so that none is drawn again.
    free = area < 0.75
    least, span = 0.08, 0.75 - 0.08
    assert stats.kstest(area[free], "uniform", (least, span)).pvalue > 0.01
    aspect = np.log(across / down)[free]
    most = np.log(4 / 3)
    assert stats.kstest(aspect, "uniform", (-most, 2 * most)).pvalue > 0.01
    for start, length in ((left, across), (upper, down)):
        place = start[free] / (1000 - length[free])
        assert stats.kstest(place, "uniform").pvalue > 0.01
    assert area.max() > 0.97


@pytest.mark.parametrize(("width", "height"), [(500, 375), (40, 1000), (3, 2), (1, 1)])
def test_random_boxes_lie_inside(width, height):
    left, upper, right, lower = boxes(width, height, 500)
    assert (left >= 0).all()
    assert (upper >= 0).all()
    assert (right <= width).all()
    assert (lower <= height).all()
    assert (np.minimum(right - left, lower - upper) > 0).all()


def test_half_of_the_images_are_mirrored():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:] = np.arange(0, 256, 8)[:, None]
    encoded, rng = tiny.jpeg(pixels), np.random.default_rng(0)
    found = [images.for_training(encoded, 8, rng) for _ in range(1000)]
    mirrored = sum(image[4, 0, 0] > image[4, -1, 0] for image in found)
    assert stats.binomtest(int(mirrored), 1000).pvalue > 0.01
