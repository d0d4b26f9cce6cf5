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

from bn_jax.surgery import diagnose, fold, freeze, recalibrate

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
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
            return losses.mean(), new

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


def test_fold_and_freeze(trained, digits):
    other = digits[0][-8:]
    want = MODEL.apply(trained, other, train=False)
    folded = fold(MODEL, trained, digits[0][:8], train=False)
    assert (len(folded.pairs), folded.refused) == (NORMS, {})
    assert folded.difference <= 1e-5
    frozen = freeze(MODEL, trained, normalize="*", keep="*")
    for model, variables in ((folded.model, folded.variables), (frozen, trained)):
        got, new = model.apply(variables, other, mutable=["batch_stats"])
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], trained["batch_stats"])


def test_recalibrate(trained, digits):
    batches = [digits[0][i : i + 128] for i in range(0, 512, 128)]
    new = recalibrate(MODEL, trained, batches, layer_by_layer=True, train=True)
    assert accuracy(MODEL, new, digits) > accuracy(MODEL, trained, digits) - 0.02
    assert accuracy(MODEL, new, digits) > 0.5


def test_diagnose(trained, digits):
    healthy = recalibrate(MODEL, trained, [digits[0][:512]], train=True)
    assert diagnose(MODEL, healthy, digits[0][:256]) == []
    stats = jax.tree.map(lambda v: v, healthy["batch_stats"])
    stats["BasicBlock_1"]["norm_proj"]["var"] *= 100
    findings = diagnose(MODEL, {**healthy, "batch_stats": stats}, digits[0][:256])
    assert ("stale", ("BasicBlock_1", "norm_proj")) in {(f.kind, f.path) for f in findings}
    assert {f.path for f in findings} == {("BasicBlock_1", "norm_proj")}
