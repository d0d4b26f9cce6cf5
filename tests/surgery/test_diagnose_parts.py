"""The measures behind the findings, against float64, identities and brute force."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnose_subjects import SUBJECTS, fresh

import bn_jax.linen
from bn_jax.surgery.diagnose import Finding, diagnose, findings_to_json
from bn_jax.surgery.diagnose.findings import KINDS, worst_first
from bn_jax.surgery.diagnose.gap import bisected, distance
from bn_jax.surgery.diagnose.statistics import SAMPLING, divergence
from bn_jax.surgery.diagnose.watch import Norm, joined, measure

RNG = np.random.default_rng(0)


def a_norm(x, mean, var, mask=None):
    layer = bn_jax.linen.BatchNorm(epsilon=1e-5)
    leaves = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
    seen = jax.jit(measure, static_argnums=2)(jnp.asarray(x), mask, -1)
    return Norm(("norm",), layer, leaves, seen, len(x), x.dtype, True)


def test_divergence_against_float64():
    x = RNG.normal(2, 3, size=(50, 5)).astype(np.float32)
    mean, var = RNG.normal(size=5), RNG.uniform(0.5, 4, size=5)
    found, expected = divergence(a_norm(x, mean.astype("f4"), var.astype("f4")))
    x = np.float64(x)
    batch, running = x.var(0) + 1e-5, var + 1e-5
    apart = (x.mean(0) - mean) ** 2 / running
    divergences = (batch / running - 1 - np.log(batch / running) + apart) / 2
    np.testing.assert_allclose(found, np.median(divergences), 1e-5)
    fourth = np.var((x - x.mean(0)) ** 2, 0)
    noise = (x.var(0) / batch + fourth / batch**2 / 2) / 2 / 49
    np.testing.assert_allclose(expected, np.median(noise), 1e-5)


def test_the_mean_divergence_of_samples_is_what_is_expected():
    """Of normal elements 1/n; n = 40."""
    mean, var = np.zeros(2001, "f4"), np.ones(2001, "f4")
    norm = a_norm(RNG.normal(size=(40, 2001)).astype("f4"), mean, var + 1e-6)
    batch, (of_mean, of_var) = norm.seen
    of_each = (batch.var - 1 - jnp.log(batch.var) + batch.mean**2) / 2
    np.testing.assert_allclose(np.mean(of_each), 1 / 40, 0.1)
    np.testing.assert_allclose(np.mean(of_mean + of_var / 2) / 2, 1 / 40, 0.1)


@pytest.mark.parametrize("features", [1, 16])
def test_sampling_alone_is_not_stale(features):
    """Not once in 300 small batches, though it is past its expectation in every third."""
    past = [
        found / expected
        for found, expected in (
            divergence(a_norm(x, np.zeros(features, "f4"), np.full(features, 1 + 1e-6, "f4")))
            for x in RNG.normal(size=(300, 16, features)).astype("f4")
        )
    ]
    assert np.mean(np.array(past) > SAMPLING) <= 0.01
    assert max(past) > 1


def test_elements_of_one_example_are_one_another():
    """Positions that repeat an example say no more about the mean than it does."""
    x = jnp.asarray(RNG.normal(size=(20, 3)))
    alone, repeated = measure(x, None, -1), measure(jnp.stack([x] * 7, 1), None, -1)
    for a, b in zip(alone.noise, repeated.noise, strict=True):
        np.testing.assert_allclose(a, b, 1e-5)


def test_a_mask_is_as_if_the_others_were_not_there():
    x = jnp.asarray(RNG.normal(size=(20, 3)))
    mask = jnp.arange(20)[:, None] < 15
    masked = measure(x.at[15:].set(jnp.nan), mask, -1)
    alone = measure(x[:15], None, -1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4), masked[0], alone[0])
    # 20 examples are counted, of which 5 say nothing: 20/19 in place of 15/14.
    for a, b in zip(masked.noise, alone.noise, strict=True):
        np.testing.assert_allclose(a / (20 / 19), b / (15 / 14), 1e-4)


def test_one_example_says_nothing_about_sampling():
    norm = a_norm(np.ones((1, 9, 2), "f4"), np.ones(2, "f4"), np.ones(2, "f4"))
    assert divergence(norm)[1] == math.inf


def test_two_batches_are_one():
    x = RNG.normal(size=(400, 3)).astype("f4")
    mean, var = np.full(3, 0.2, "f4"), np.full(3, 2, "f4")
    parts = [a_norm(part, mean, var) for part in np.split(x, [100])]
    both, whole = joined(None, parts[0]), a_norm(x, mean, var)
    both = joined(both, parts[1])
    assert both.elements == 100
    for a, b, tolerance in zip(divergence(both), divergence(whole), (1e-5, 0.05), strict=True):
        np.testing.assert_allclose(a, b, tolerance)


@pytest.mark.parametrize("last", [1, 2, 3, 7, 50])
def test_bisection_finds_every_place(last):
    for place in range(1, last + 1):
        tried = []
        assert bisected(lambda k, p=place, t=tried: t.append(k) or k >= p, last) == place
        assert len(tried) <= math.ceil(math.log2(last))


def test_distance():
    b = {"y": jnp.array([1.0, 3.0]), "n": jnp.array([1, 2])}
    a = {"y": jnp.array([1.0, 5.0]), "n": jnp.array([7, 7])}
    np.testing.assert_allclose(distance(a, b), math.sqrt(2))
    assert distance(b, b) == 0
    np.testing.assert_allclose(distance(jnp.array(3.0), jnp.array(2.0)), 0.5)


def test_bad_input():
    with pytest.raises(ValueError, match="pass a batch"):
        diagnose(*fresh(SUBJECTS["linen"]))


def a_finding(kind, figure, path=("norm",)):
    return Finding(kind, path, figure, 0, "it is so", "do this")


def test_order():
    every = [a_finding(kind, figure) for kind in reversed(KINDS) for figure in (2, 3, 1)]
    found = worst_first(every)
    assert list(dict.fromkeys(f.kind for f in found)) == list(KINDS)
    figures = {kind: [f.figure for f in found if f.kind == kind] for kind in KINDS}
    assert figures.pop("nonfinite") == [2, 3, 1]
    for kind in ("negative_variance", "low_variance", "too_few_elements"):
        assert figures.pop(kind) == [1, 2, 3]
    assert set(map(tuple, figures.values())) == {(3, 2, 1)}


def test_json():
    subject = fresh(SUBJECTS["nnx"], bias=True)
    found = [*subject.diagnose(), a_finding("stale", math.inf, ("blocks", 0, "norm"))]
    records = json.loads(findings_to_json(found))
    assert [Finding(**{**r, "path": tuple(r["path"])}) for r in records[:-1]] == found[:-1]
    assert records[-1] == {
        "kind": "stale", "path": ["blocks", 0, "norm"], "figure": None, "threshold": 0,
        "meaning": "it is so", "remedy": "do this",
    }  # fmt: skip
    assert findings_to_json([]) == "[]"
