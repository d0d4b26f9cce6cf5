"""From an encoded image to a square of RGB pixels, on the CPU, with Pillow.

What is cut out is resized with an antialiased bilinear filter. A JPEG is decoded at a half,
a quarter or an eighth of its size where what is cut out is then still as large as the result.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

CENTRE = 0.875  # of the shorter side: 224 of 256
# Szegedy et al. 2015 (Going Deeper with Convolutions, section 6); tries as in torchvision.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


def centre_box(width: int, height: int) -> Box:
    """The square of 87.5 % of the shorter side in the middle."""
    side = CENTRE * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(rng: np.random.Generator, width: int, height: int) -> Box:
    """A rectangle of whole pixels of 8 to 100 % of the area, of aspect 3/4 to 4/3.

    The area is uniform and the logarithm of the aspect too; a rectangle that does not fit is
    drawn again, up to 10 times, and then it is `centre_box`. Where it fits is uniform.
    """
    for _ in range(TRIES):
        area = rng.uniform(*AREA) * width * height
        aspect = math.exp(rng.uniform(*np.log(ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            left, upper = rng.integers(0, (width - w + 1, height - h + 1)).tolist()
            return left, upper, left + w, upper + h
    return centre_box(width, height)


def decode(encoded: bytes, size: int, choose_box: Callable[[int, int], Box]) -> np.ndarray:
    """What `choose_box(width, height)` cuts out, as uint8 `[size, size, 3]`.

    Greyscale, CMYK and palettes become RGB; an orientation in the metadata is ignored, as
    TensorFlow ignores it.

    Raises:
      Exception: the image is broken; Pillow has a dozen of types for that.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        width, height = image.size
        box = choose_box(width, height)
        across, down = box[2] - box[0], box[3] - box[1]
        enough = math.ceil(width * size / across), math.ceil(height * size / down)
        if (draft := image.draft(image.mode, enough)) is not None:
            scale = draft[1][2] / width
            box = box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR, box))


def for_evaluation(encoded: bytes, size: int) -> np.ndarray:
    """`decode` with the centre of the image."""
    return decode(encoded, size, centre_box)


def for_training(encoded: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """`decode` with a random part of the image, mirrored with probability one half."""
    pixels = decode(encoded, size, lambda width, height: random_box(rng, width, height))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels
