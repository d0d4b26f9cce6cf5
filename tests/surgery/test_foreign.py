"""A network that somebody else wrote, trained, and then operated on, its source unchanged.

A residual network in the style of Flax's ImageNet example, with Flax's own layers, after 50
steps on handwritten digits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import BasicBlock, ResNet
from sklearn.datasets import load_digits

from bn_jax.surgery import (
    accumulate_exactly,
    decay_mask,
    diagnose,
    fold,
    freeze,
    frozen_mask,
    recalibrate,
)
from bn_jax.training.metrics import cross_entropy

MODEL = ResNet((1, 1), BasicBlock, num_classes=10, filters=16)
NORMS = 6  # the stem's, two in each block, one in the second one's shortcut


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = np.repeat(data.images[..., None] / 8 - 1, 3, -1).astype(np.float32)
    # Of the size that the stem's strides are made for.
    return jnp.asarray(images.repeat(4, 1).repeat(4, 2)), jnp.asarray(data.target)


@pytest.fixture(scope="module")
def trained(digits):
    """Variables after 50 steps of 32 images."""
    images, labels = digits
    optimizer = optax.sgd(0.1, momentum=0.9)
    variables = jax.jit(MODEL.init)(jax.random.key(0), images[:1])

    @jax.jit
    def step(variables, opt_state, images, labels):
        def loss(params):
            outputs, new = MODEL.apply(
                {**variables, "params": params}, images, mutable=["batch_stats"]
            )
            return cross_entropy(outputs, labels).mean(), new

        (_, new), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    opt_state = optimizer.init(variables["params"])
    for i in range(50):
        rows = slice(32 * i % 1024, 32 * i % 1024 + 32)
        variables, opt_state = step(variables, opt_state, images[rows], labels[rows])
    return variables


def accuracy(model, variables, digits):
    images, labels = digits
    outputs = model.apply(variables, images[1024:1280], train=False)
    return float((outputs.argmax(-1) == labels[1024:1280]).mean())


def test_fold(trained, digits):
    folded = fold(MODEL, trained, digits[0][:8], train=False)
    assert len(folded.pairs) == NORMS
    assert not folded.refused
    assert folded.difference <= 1e-5
    assert "batch_stats" not in folded.variables
    other = digits[0][-8:]
    want = MODEL.apply(trained, other, train=False)
    got = folded.model.apply(folded.variables, other, train=False)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_recalibrate(trained, digits):
    batches = [digits[0][i : i + 128] for i in range(0, 512, 128)]
    new = recalibrate(MODEL, trained, batches, layer_by_layer=True, train=True)
    assert accuracy(MODEL, new, digits) > accuracy(MODEL, trained, digits) - 0.02
    assert accuracy(MODEL, new, digits) > 0.5
    # The statistics are those of what the layers see at inference.
    joined, seen = jnp.concatenate(batches), []
    jax.tree.map(np.testing.assert_array_equal, new["params"], trained["params"])
    _, state = MODEL.apply(
        new, joined, train=False, mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "conv_init",
    )  # fmt: skip
    seen = state["intermediates"]["conv_init"]["__call__"][0]
    np.testing.assert_allclose(
        new["batch_stats"]["bn_init"]["mean"], seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        new["batch_stats"]["bn_init"]["var"], seen.var((0, 1, 2)), rtol=1e-4
    )


def test_freeze(trained, digits):
    frozen = freeze(MODEL, trained, normalize="*", keep="*")
    y, new = frozen.apply(trained, digits[0][:8], mutable=["batch_stats"])
    np.testing.assert_allclose(y, MODEL.apply(trained, digits[0][:8], train=False), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], trained["batch_stats"])
    optimizer = optax.chain(
        optax.adamw(1e-2, mask=decay_mask(trained)),
        optax.masked(optax.set_to_zero(), frozen_mask(trained, "BasicBlock_*")),
    )
    grads = jax.tree.map(jnp.ones_like, trained["params"])
    updates, _ = optimizer.update(grads, optimizer.init(trained["params"]), trained["params"])
    moved = {
        "/".join(k.key for k in path)
        for path, v in jax.tree_util.tree_leaves_with_path(updates)
        if v.any()
    }
    still = {p for p in moved if "BasicBlock" in p and ("BatchNorm" in p or "norm_proj" in p)}
    assert not still
    assert {"bn_init/scale", "BasicBlock_0/Conv_0/kernel", "Dense_0/bias"} <= moved


def test_diagnose(trained, digits):
    healthy = recalibrate(MODEL, trained, [digits[0][:512]], train=True)
    assert diagnose(MODEL, healthy, digits[0][:256]) == []
    stats = jax.tree.map(lambda v: v, healthy["batch_stats"])
    stats["BasicBlock_1"]["norm_proj"]["var"] *= 100
    findings = diagnose(MODEL, {**healthy, "batch_stats": stats}, digits[0][:256])
    assert ("stale", ("BasicBlock_1", "norm_proj")) in {(f.kind, f.path) for f in findings}
    assert {f.path for f in findings} == {("BasicBlock_1", "norm_proj")}


def test_accumulate(trained, digits):
    def loss(outputs, labels):
        return cross_entropy(outputs, labels).mean()

    images, labels = digits[0][:16], digits[1][:16]

    def big(params):
        outputs, _ = MODEL.apply({**trained, "params": params}, images, mutable=["batch_stats"])
        return loss(outputs, labels)

    want = jax.jit(jax.grad(big))(trained["params"])
    parts = images.reshape(2, 8, *images.shape[1:]), labels.reshape(2, 8)
    _, got, _ = accumulate_exactly(MODEL, trained, loss, parts, train=True)
    largest = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), got, want)
