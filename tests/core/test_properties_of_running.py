"""Running statistics after any sequence of batches, against recursions in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import strategies as st
from strategies import holds
from subjects import compiled
from tolerances import assert_close

from bn_jax.core.moments import Moments
from bn_jax.core.running import BatchStats, cumulative_mean, debiased_ema, ema

STEPS, FEATURES = 6, 3


class Kept(NamedTuple):
    """How statistics are kept, which is compiled."""

    dtype: str
    unbiased: bool
    per_feature: bool

    @property
    def wide(self):
        return np.dtype("float64" if self.dtype == "float64" else "float32")


KEPT = [
    Kept("float32", False, False),
    Kept("float32", True, True),
    Kept("bfloat16", True, False),
    Kept("float64", False, True),
    Kept("float64", True, False),
]


def run(kept, estimator, start, batches, momenta):
    """All steps; a momentum for each is a schedule, one for all a number."""
    options = {"unbiased": kept.unbiased}
    if momenta is not None:
        options["momentum"] = (lambda count: momenta[count]) if momenta.ndim else momenta

    def step(stats, batch):
        return estimator(stats, batch, **options), None

    return jax.lax.scan(step, start, batches)[0]


class History(NamedTuple):
    """Moments of STEPS batches, as 10^exponent times normal numbers, and what was before.

    `counts` are those of the batches, or of which each feature has some part, in a unit.
    """

    seed: int
    exponent: int
    counts: tuple[int, ...]
    unit: float


histories = st.builds(
    History,
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-15, 15),
    counts=st.tuples(*[st.sampled_from([8, 0, 1, 2, 1000])] * STEPS),
    unit=st.sampled_from([1, 0.3, 1e-30]),
)
numbers = st.sampled_from([0.9, 0.99, 0.999, 1 - 1e-6, 0.5, 0]) | st.floats(0, 0.999)


def make(kept, history):
    rng = np.random.default_rng(history.seed)
    unit = 10.0**history.exponent
    mean, start_mean = np.split(unit * rng.normal(size=(STEPS + 1, FEATURES)), [STEPS])
    var, start_var = np.split(unit * rng.exponential(size=(STEPS + 1, FEATURES)), [STEPS])
    count = np.array(history.counts, float)
    if kept.per_feature:
        count = np.round(count[:, None] * rng.choice([0, 0.5, 1], size=mean.shape))
    weight = np.full(count.shape, history.unit)
    batches = Moments(*(v.astype(kept.wide) for v in (mean, var, count * weight, weight)))
    dtype = jnp.dtype(kept.dtype)
    start = BatchStats(start_mean[0].astype(dtype), start_var[0].astype(dtype), np.int32(0))
    return start, batches


def counted(kept, start):
    """Where batches lack features their updates are counted for each."""
    return start._replace(count=np.zeros(FEATURES, np.int32)) if kept.per_feature else start


def assert_follows(kept, estimator, start, batches, momentum, recursion):
    """As `recursion(start, values)` in float64, but for rounding.

    Each step rounds its terms and their sum in the wide dtype, where XLA's log1p is off by
    40 eps, and the statistics to their own.
    """
    got = compiled(run, kept, estimator)(start, batches, momentum)
    mean, var, count, weight = (np.asarray(v, np.float64) for v in batches)
    count, weight = (v.reshape(STEPS, -1) for v in (count, weight))
    known = reference.has_variance(count, weight)
    if kept.unbiased:
        var = reference.unbiased(var, count, weight)
    own, wide = (float(jnp.finfo(dtype).eps) for dtype in (kept.dtype, kept.wide))
    off = STEPS * own / 2 + (4 * STEPS + 40) * wide
    seen = count > 0 if estimator is ema else known
    for name, values, counted in ("mean", mean, seen), ("var", var, known):
        before = np.asarray(getattr(start, name), np.float64)
        largest = np.max(np.abs(np.vstack([before, values])), axis=0)
        assert_close(
            getattr(got, name), recursion(before, values, counted, known), off * largest, name
        )
    want = np.sum(known if start.count.ndim else np.any(known, axis=1), axis=0)
    np.testing.assert_array_equal(got.count, want)
    assert (got.mean.dtype, got.var.dtype) == (start.mean.dtype, start.var.dtype)


schedules = st.tuples(*[numbers | st.just(1)] * STEPS)


@holds(1000, kept=st.sampled_from(KEPT), history=histories, momenta=schedules)
def test_ema(kept, history, momenta):
    start, batches = make(kept, history)
    momenta = np.asarray(momenta, kept.wide)

    def recursion(value, batch_values, counted, known):
        updates = 0
        for new, *counts in zip(batch_values, counted, known, strict=True):
            value = reference.ema(value, new, np.float64(momenta[updates]), counts[0])
            updates += np.any(counts[1])
        return value

    assert_follows(kept, ema, start, batches, momenta, recursion)


@holds(1000, kept=st.sampled_from(KEPT), history=histories, momentum=numbers)
def test_debiased_ema(kept, history, momentum):
    start, batches = make(kept, history)
    momentum = np.asarray(momentum, kept.wide)

    def recursion(value, batch_values, counted, _):
        return reference.debiased_ema(value, batch_values, counted, np.float64(momentum))

    assert_follows(kept, debiased_ema, counted(kept, start), batches, momentum, recursion)


@holds(600, kept=st.sampled_from(KEPT), history=histories)
def test_cumulative_mean(kept, history):
    start, batches = make(kept, history)

    def recursion(value, batch_values, counted, _):
        return reference.cumulative_mean(value, batch_values, counted)

    assert_follows(kept, cumulative_mean, counted(kept, start), batches, None, recursion)
