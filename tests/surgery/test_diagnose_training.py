"""Findings about how a model is called and trained."""

import jax
import numpy as np
import optax
import pytest
from diagnose_subjects import (
    NORMS,
    SUBJECTS,
    dropout_rngs,
    each_subject,
    healthy,
    kinds,
)


@each_subject
def test_training_mode_in_evaluation(build):
    found = healthy(build, always=False).diagnose()
    assert kinds(found) == {("training_mode_in_evaluation", NORMS[1])}


@each_subject
def test_useless_bias(build):
    found = healthy(build, bias=True).diagnose()
    assert [(f.kind, f.path, f.figure) for f in found] == [
        ("useless_bias", (p,), 8) for p in ("dense0", "dense1")
    ]


@each_subject
def test_useful_bias(build):
    """There is something between it and the BatchNorm, or that is frozen."""
    between = healthy(build, bias=True, between=jax.nn.softplus).diagnose()
    frozen = healthy(build, bias=True, always=True).diagnose()
    assert kinds(between) == {("useless_bias", ("dense0",))}
    # Recalibration leaves a layer that its constructor froze with its initial statistics.
    assert kinds(frozen) == kinds(between) | {("never_updated", NORMS[1])}


def not_scale(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, v: all(getattr(p, "key", None) != "scale" for p in path), params
    )


WARM_UP = optax.warmup_constant_schedule(0, 1e-2, 10)
DECAYING = {
    "adamw": optax.adamw(1e-2),
    "adamw, warm-up": optax.adamw(WARM_UP),
    "sgd, L2": optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(WARM_UP, 0.9)),
    "mask": optax.add_decayed_weights(1.0, lambda p: jax.tree.map(lambda _: True, p)),
    "accumulated": optax.MultiSteps(optax.adamw(1e-2), 8),
}
SPARING = {
    "adam": optax.adam(1e-2),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(1e-2)),
    "adamw": optax.adamw(1e-2, mask=not_scale),
    "mask": optax.add_decayed_weights(1.0, not_scale),
}


@pytest.mark.parametrize("optimizer", DECAYING.values(), ids=DECAYING)
def test_decayed_scale(optimizer):
    found = healthy(SUBJECTS["linen"]).diagnose(optimizer=optimizer)
    assert [(f.kind, f.path) for f in found] == [("decayed_scale", p) for p in NORMS]


@pytest.mark.parametrize("optimizer", SPARING.values(), ids=SPARING)
def test_scale_that_is_not_decayed(optimizer):
    assert healthy(SUBJECTS["linen"]).diagnose(optimizer=optimizer) == []


def test_decay_in_figures():
    """Of lr * weight_decay in a step."""
    found = healthy(SUBJECTS["linen"]).diagnose(optimizer=optax.adamw(0.5, weight_decay=0.01))
    np.testing.assert_allclose([f.figure for f in found], 0.005, 1e-5)


@each_subject
def test_dropout(build):
    train = dropout_rngs(build)
    subject = healthy(build, dropout=0.3)
    assert subject.diagnose(train=train) == []
    ill = subject.scaled_stats(NORMS[1], 4)
    assert kinds(ill.diagnose(train=train)) == {
        ("train_evaluation_gap", NORMS[1]), ("stale", NORMS[1]),
    }  # fmt: skip
