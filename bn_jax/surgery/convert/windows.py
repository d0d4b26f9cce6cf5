"""Strides, dilations and paddings of convolutions, which shapes of kernels do not show.

Flax's "SAME" with a stride of 2 pads an even image by (0, 1), and torch's padding=1 by (1, 1):
the outputs have one shape and are shifted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax import lax

Padding = str | tuple[tuple[int, int], ...]


def window(rank: int, strides: Any, dilation: Any, padding: Any) -> dict[str, Any]:
    """The settings of a convolution, one value or pair for each of `rank` axes."""
    if not isinstance(padding, str):
        padding = tuple(each(p, 2) for p in each(padding, rank))
    return {
        "strides": each(strides, rank),
        "kernel_dilation": each(dilation, rank),
        "padding": padding.upper() if isinstance(padding, str) else padding,
    }


def window_of(kind: str, layer: Any) -> dict[str, Any]:
    """The settings of a convolution of torch or Equinox, which name them alike."""
    padding = layer.padding
    if layer.padding_mode.upper() != "ZEROS":
        padding = layer.padding_mode
    elif kind == "ConvTranspose" and not isinstance(padding, str):
        padding = _transposed_padding(
            layer.kernel_size, padding, layer.dilation, layer.output_padding
        )
    return window(len(layer.kernel_size), layer.stride, layer.dilation, padding)


def each(v: Any, rank: int) -> tuple:
    """One value for each axis, of a number, a sequence, or None for 1."""
    return tuple(v) if isinstance(v, Sequence) else (1 if v is None else v,) * rank


def _transposed_padding(size, padding, dilation, output_padding) -> Padding:
    """Flax's padding of a ConvTranspose from [(low, high)] or numbers.

    d (k - 1) - low, d (k - 1) - high + output_padding
    """
    full = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
    pairs = [each(p, 2) for p in padding]
    return tuple(
        (n - low, n - high + extra)
        for n, (low, high), extra in zip(full, pairs, output_padding, strict=True)
    )


def resolved(kind: str, settings: dict[str, Any], window: Sequence[int], x: Sequence[int]):
    """The padding in numbers, of an input of spatial shape x; other words as they are."""
    padding, strides = settings["padding"], settings["strides"]
    size = [d * (k - 1) + 1 for k, d in zip(window, settings["kernel_dilation"], strict=True)]
    if padding not in ("SAME", "VALID"):
        return padding
    if kind == "ConvTranspose":
        return tuple(_transposed(*v, padding) for v in zip(size, strides, strict=True))
    return tuple(lax.padtype_to_pads(x, size, strides, padding))


def _transposed(size, stride, padding):
    """As `jax.lax.conv_transpose` has it."""
    if padding == "VALID":
        return size - 1, max(size, stride) - 1
    low = min(size - 1, math.ceil((size + stride - 2) / 2))
    return low, size + stride - 2 - low
