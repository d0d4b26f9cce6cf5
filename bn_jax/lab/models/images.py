"""What the networks of images are given."""

from __future__ import annotations

import jax

STEMS = ("imagenet", "small")


def check_images(x: jax.Array, stem: str = STEMS[0]) -> None:
    """Raises a ValueError unless x is `[n, height, width, channels]`; or for no such stem."""
    if x.ndim != 4:
        raise ValueError(f"images are [n, height, width, channels], not {x.shape}")
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r}: choose {' or '.join(STEMS)}")
