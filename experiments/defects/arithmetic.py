"""D1 to D5: numbers that come out wrong."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from bn_jax import debiased_ema
from experiments.defects.case import SYNCED, Case, each, first, normal
from experiments.defects.flax_layers import EPSILON, NNX
from experiments.defects.peers import FRAMEWORKS


def d1() -> list[Case]:
    """Masked statistics across replicas

    Flax (`_compute_stats` in flax/linen/normalization.py and flax/nnx/nn/normalization.py):
    each replica takes the mean of its own valid examples, and `lax.pmean` averages these as if
    each had seen as many. A replica whose examples are all masked has the mean 0/0, which
    makes every replica NaN. Without `axis_name`, or in a jit over a sharded batch, the masked
    mean is right. Haiku, Equinox and torch take no mask; Keras shares no statistics on JAX.
    """
    x = normal(4, 4, 1, std=2) + np.array([0, 1, 2, 6], np.float32).reshape(4, 1, 1)

    def case(part, title, counts):
        mask = np.arange(4)[:, None] < np.reshape(counts, (4, 1, 1))
        valid = ", ".join(map(str, counts))
        return Case(
            f"D1{part}", title,
            f"mean over 4 replicas with 4 examples each, of which {valid} are valid",
            np.mean(x[mask], dtype=np.float64), 1e-4,
            each(lambda f: first(f.replicas(x, mask)), SYNCED),
        )  # fmt: skip

    return [
        case("a", "mask, replicas", (4, 1, 2, 3)),
        case("b", "mask, empty replica", (4, 1, 2, 0)),
    ]


def d2() -> list[Case]:
    """Correction for where the running variance starts

    Equinox, `mode="batch"` (equinox/nn/_batch_norm.py): the running variance starts at 1, and
    evaluation divides it by 1 - momentum^t, which corrects an average that starts at 0. What
    is left of the 1 is momentum^t / (1 - momentum^t): 99 after one step. `mode="ema"` starts
    from the first batch. Flax and Keras have no such correction, which is why they are not in
    these rows: their running variance is the plain average from 1. bn_jax:
    `estimator=debiased_ema`, which is not the default. torch: `momentum=None`, the mean of all
    batches.
    """
    x = normal(4096, 2, std=2.5)
    true = np.var(x[:, 0], dtype=np.float64)

    def case(part, title, steps):
        def measure(f, **fields):
            return first(f.train([x] * steps, **{"momentum": 0.99, **fields}).var)

        def corrected(f):

            return measure(f, estimator=debiased_ema)

        return Case(
            f"D2{part}", title,
            f"debiased running variance after step {steps} on always the same batch, "
            "momentum .99",
            true, 0.01 * true,
            each(corrected, ["bn_jax"]) | each(measure, ["haiku", "equinox"])
            | each(lambda f: measure(f, momentum=None), ["torch"]),
            ours="`estimator=debiased_ema`", default=lambda: measure(FRAMEWORKS["bn_jax"]),
        )  # fmt: skip

    return [
        case("a", "start, 1 batch", 1),
        case("b", "start, 10 batches", 10),
        case("c", "start, 100 batches", 100),
    ]


def d3() -> list[Case]:
    """The momentum in half precision

    Haiku, `ExponentialMovingAverage.__call__` (haiku/_src/moving_averages.py): the decay is
    converted to the dtype of the statistic, which is that of the input. In bfloat16 .999 is 1:
    nothing is ever averaged in, and the average is 0/(1 - 1). A cast to float32 before the
    layer mends it.
    """

    x = np.asarray(jnp.bfloat16(normal(256, 2, mean=3)))

    def measure(f):
        half, single = (f.train([v] * 10, momentum=0.999) for v in (x, np.float32(x)))
        return first(half.mean) / first(single.mean)

    return [
        Case(
            "D3", "bfloat16 input",
            "running mean of bfloat16 input after 10 batches, momentum .999, as a multiple of "
            "that of the same numbers in float32",
            1.0, 0.02, each(measure),
        )
    ]  # fmt: skip


def d4() -> list[Case]:
    """Half-precision output

    Flax nnx (`BatchNorm.__call__` in flax/nnx/nn/normalization.py): with `dtype=bfloat16` the
    input and the running statistics are rounded to bfloat16 before the mean is subtracted;
    at 100 its numbers are 0.5 apart. Flax linen rounds the result only. Keras by its
    mixed_bfloat16 policy rounds the input of every layer, as documented, so it is measured
    with `autocast=False`. Haiku, Equinox and torch have no dtype for the output alone. bn_jax:
    its nnx layer.
    """

    x = normal(1024, 2, mean=100)
    mean, var = np.mean(x, 0, np.float64), np.var(x, 0, np.float64)
    true = (x - mean) / np.sqrt(var + EPSILON)

    def measure(f, **fields):
        y = f.evaluate(x, np.float32(mean), np.float32(var), **fields)
        return float(np.max(np.abs(np.float64(y) - true)))

    def flax(f):
        return measure(f, dtype=jnp.bfloat16)

    def keras(f):
        return measure(f, dtype="mixed_bfloat16", autocast=False)

    return [
        Case(
            "D4", "bfloat16 output",
            "largest error in evaluation with a bfloat16 output, of which the last digit is "
            "worth up to 0.0156, for float32 input with mean 100, std 1",
            0.0, 2**-6,
            {"bn_jax": lambda: flax(NNX("bn_jax"))} | each(flax, ["flax linen", "flax nnx"])
            | each(keras, ["keras"]),
        )
    ]  # fmt: skip


def d5() -> list[Case]:
    """Variance as E[x^2] - E[x]^2

    Haiku (haiku/_src/batch_norm.py) and Flax by default (`use_fast_variance=True`,
    `_compute_stats` in flax/linen/normalization.py and flax/nnx/nn/normalization.py) subtract
    two numbers of size mean^2, each rounded to float32: the variance is off by some 1e-7
    mean^2. Flax clamps it at 0, which hides the error; Haiku does not, and the root of a
    negative number is NaN. `use_fast_variance=False` mends Flax's, at the price of a second
    pass. The error at mean 100 is of little consequence; that at 10,000 is not.
    """

    def case(part, mean):
        x = normal(1024, 64, mean=mean)
        true = np.var(x, 0, np.float64) + EPSILON

        def measure(f):
            y = np.float64(f.train([x]).y)
            with np.errstate(divide="ignore"):
                used = np.var(x, 0, np.float64) / np.var(y, 0)
            return float(np.max(np.abs(used / true - 1)))

        return Case(
            f"D5{part}", f"mean {mean:,.0f} std",
            "largest relative error of (variance + epsilon) among 64 features of 1,024 "
            f"examples with mean {mean:,.0f}, std 1, as the training output shows it",
            0.0, 1e-3, each(measure),
        )  # fmt: skip

    return [case("a", 1e2), case("b", 1e3), case("c", 1e4)]
