"""D6 to D8, and D11: what should be refused, skipped or left alone."""

from __future__ import annotations

import warnings

import jax
import numpy as np

from experiments.defects.case import MASKED, Case, each, first, normal
from experiments.defects.peers import FRAMEWORKS


def d6() -> list[Case]:
    """What is not refused

    a: a mask of shape (N,) meets an input of (N, C) by NumPy's rule, so that it masks
    channels where N = C (Flax, documented as 'broadcastable'), and examples in Keras. b:
    linen makes running statistics that are missing (a `self.variable` in
    flax/linen/normalization.py), Haiku those that are not in the state (haiku/_src/base.py,
    `get_state`); both as if training had just begun. c: linen and Haiku broadcast
    statistics of shape (1,) to all features. d: in linen and Haiku an update follows the dtype
    of the input, so that float64 data changes the type of the state, which a `lax.scan` over
    steps refuses. torch and Equinox refuse the input, which is as good.
    """
    square, x = normal(4, 4, mean=2), normal(16, 3)
    keep = np.array([True, True, False, False])
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)

    def restored(stats):
        def measure(f):
            return f"silent: a running mean of shape {f.restored(x, stats).shape}"

        return measure

    def running_dtype(f):

        with jax.enable_x64(True), warnings.catch_warnings():
            # nnx assigns float64 into float32, of which JAX does not approve.
            warnings.filterwarnings("ignore", "scatter inputs have incompatible types")
            return str(f.train([np.float64(x)]).mean.dtype)

    return [
        Case(
            "D6a", "mask (N,)",
            "mean of feature 0 with a mask of shape (N,) for an input of (N, C), N = C",
            np.mean(square[keep, 0], dtype=np.float64), 1e-4,
            each(lambda f: first(f.train([square], [keep], momentum=0.0).mean), MASKED),
            raises=True, or_refused=True,
        ),
        Case(
            "D6b", "no stats",
            "whether training from a checkpoint without running statistics is refused",
            "error", 0, each(restored(None)), raises=True,
        ),
        Case(
            "D6c", "stats (1,)",
            "whether training from running statistics of shape (1,) for 3 features is refused",
            "error", 0, each(restored((zero, one))), raises=True,
        ),
        Case(
            "D6d", "float64 input",
            "dtype of a float32 running mean after training on float64 input",
            "float32", 0, each(running_dtype), raises=True, or_refused=True,
        ),
    ]  # fmt: skip


def d7() -> list[Case]:
    """A bad batch that is skipped

    Loss scaling drops a step whose gradients are not finite, but the forward pass has updated
    the running statistics, which are then infinite or NaN for good. Flax's ImageNet example
    (examples/imagenet/train.py, `train_step`) restores parameters and optimizer state and
    keeps `batch_stats`; torch's GradScaler skips the optimizer alone. In Flax, Haiku and
    Equinox the caller can select the old state as well, and has to know. bn_jax:
    `skip_nonfinite=True`; by default it is poisoned like the others.
    """
    good, bad = normal(16, 2, mean=3), normal(16, 2, mean=3, seed=1)
    bad[0] = np.inf

    def measure(f, **fields):
        before, after = (f.train(v, momentum=0.9, **fields) for v in ([good], [good, bad]))
        return first(after.mean) / first(before.mean)

    return [
        Case(
            "D7", "bad batch",
            "running mean after a batch with an infinite input, whose step loss scaling skips, "
            "as a multiple of that before", 1.0, 1e-6,
            each(measure) | each(lambda f: measure(f, skip_nonfinite=True), ["bn_jax"]),
            ours="`skip_nonfinite=True`", default=lambda: measure(FRAMEWORKS["bn_jax"]),
        )
    ]  # fmt: skip


def d8() -> list[Case]:
    """One example

    The mean of one example is the example, so that the output is the bias whatever the input,
    and nothing is learnt. torch raises, and bn_jax unless `allow_single=True`.
    """
    x = normal(1, 3, mean=2)

    def measure(f):
        return f"silent: an output of {first(f.train([x]).y):.3g} for {first(x):.3g}"

    return [
        Case(
            "D8", "one example", "whether training on one example is refused", "error", 0,
            each(measure), raises=True,
        )
    ]  # fmt: skip


def d11() -> list[Case]:
    """Masks in Keras

    `BatchNormalization._moments` (keras/src/layers/normalization/batch_normalization.py)
    squeezes every axis of size 1, so that one channel leaves no axis (a); expands the mask
    at the last axis, wherever the features are (b; a mask of shape (N, 1) does work); and
    divides by (number of valid elements + 1e-7), so that of none the mean is 0, towards which
    the moving mean goes (c). Flax divides 0 by 0 in (c), and its running statistics are NaN
    from there on.
    """
    x, sequences = normal(8, 2, mean=2), normal(4, 3, 5, mean=2)
    examples, valid = np.arange(8) < 5, np.arange(5) < [[5], [3], [2], [4]]
    nothing = np.zeros(8, bool)

    def mean(x, mask, axis=-1):
        def measure(f):
            masks = [f.as_mask(mask, axis)]
            return first(f.train([x], masks, momentum=0.0, axis=axis).mean)

        return measure

    def after_nothing(f):
        def train(masks):
            masks = [f.as_mask(mask) for mask in masks]
            return f.train([x] * len(masks), masks, momentum=0.9)

        return first(train([examples, nothing]).mean) / first(train([examples]).mean)

    return [
        Case(
            "D11a", "mask, one channel", "mean of a batch of one channel with a mask",
            np.mean(x[examples, 0], dtype=np.float64), 1e-4,
            each(mean(x[:, :1], examples), MASKED), raises=True,
        ),
        Case(
            "D11b", "mask, channels first",
            "mean of channel 0 of padded sequences (N, C, T) with a mask of (N, T)",
            np.mean(sequences[:, 0][valid], dtype=np.float64), 1e-4,
            each(mean(sequences, valid, axis=1), MASKED), raises=True,
        ),
        Case(
            "D11c", "all masked",
            "running mean after a batch that is all masked, as a multiple of that before",
            1.0, 1e-6, each(after_nothing, MASKED),
        ),
    ]  # fmt: skip
