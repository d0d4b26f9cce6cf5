"""Examples that only fill up a batch change nothing for the others, in any network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.lab.models import CNN, LSTM, MLP, CifarA, CifarB, Inception
from bn_jax.linen import BatchNorm

NORM = functools.partial(BatchNorm, momentum=0.5)
IMAGES = jax.random.normal(jax.random.key(0), (9, 8, 8, 3))
FAMILIES = {
    "mlp": MLP((6, 5), 4, norm=NORM, places=("input", "before", "after")),
    "cnn": CNN((6, 5), 4, norm=NORM, places=("input", "after")),
    "cifar_a": CifarA((4, 6, 5), 4, norm=NORM, dropout=0),
    "cifar_b": CifarB((4, 6), 4, norm=NORM, dropout=0),
    "inception": Inception(4, norm=NORM, stem="small", width=0.1, blocks=("3c", "5b")),
    "lstm": LSTM(5, 4, norm=NORM, places=("recurrent", "output"), initial_scale=1.0),
}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.long if f == "inception" else ()) for f in FAMILIES],
)
def test_masked_examples_do_not_count(family):
    model = FAMILIES[family]
    variables = model.init(jax.random.key(1), IMAGES, train=False)

    def loss(params, images, mask, rows):
        out, updates = model.apply(
            {**variables, "params": params}, images, train=True, mask=mask,
            mutable=["batch_stats"],
        )  # fmt: skip
        return (out[rows] ** 2).sum(), (out[rows], updates)

    grad = jax.jit(jax.grad(loss, has_aux=True))
    real = np.array([0, 2, 3, 4, 6, 7])
    mask = jnp.zeros(9, bool).at[real].set(True)
    expected = grad(variables["params"], IMAGES[real], None, np.arange(6))
    found = grad(variables["params"], IMAGES, mask, real)
    everyone = grad(variables["params"], IMAGES, None, real)

    def close(a, b):
        # Sums that cancel have the rounding of their terms, which the largest one shows.
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * max(1.0, np.abs(b).max()))

    jax.tree.map(close, found, expected)
    with pytest.raises(AssertionError):
        jax.tree.map(close, everyone, expected)
