"""The two CIFAR-10 networks: the published counts, and torch's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.lab.models import CifarA, CifarB
from bn_jax.linen import BatchNorm

SMALL = {CifarA: (3, 4, 6, 5), CifarB: (3, 4, 6)}
IMAGES = jax.random.normal(jax.random.key(0), (5, 10, 11, 3))

# These programs run once, for milliseconds, and take seconds to optimise.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shapes(model, image=(32, 32, 3)):
    init = functools.partial(model.init, train=False)
    found = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *image)))
    return jax.tree.map(lambda v: v.shape, found, is_leaf=lambda v: hasattr(v, "shape"))


def sizes(model):
    leaves = functools.partial(jax.tree.leaves, is_leaf=lambda v: isinstance(v, tuple))
    found = shapes(model)
    return [sum(map(np.prod, leaves(found.get(k, {})))) for k in ("params", "batch_stats")]


def randomised(model):
    """The model's variables, no two scales or biases of a size."""
    init = jit(functools.partial(model.init, train=False))
    leaves, tree = jax.tree.flatten(init(jax.random.key(1), IMAGES))
    rng = np.random.default_rng(2)
    return tree.unflatten([
        np.float32(v * rng.uniform(0.5, 1.5, v.shape) + rng.uniform(0, 0.2, v.shape))
        for v in leaves
    ])  # fmt: skip


def test_network_a_has_the_published_counts():
    assert sizes(CifarA(norm=BatchNorm)) == [1_404_970, 1_920]
    assert sizes(CifarA()) == [1_404_970 - 1_920, 0]


def test_the_counts_of_network_b():
    """1,250,858 is what Keras prints for its CIFAR-10 example, the network without a norm."""
    normalised = 32 + 32 + 64 + 64 + 512
    assert sizes(CifarB()) == [1_250_858, 0]
    assert sizes(CifarB(norm=BatchNorm)) == [1_250_858 + normalised, 2 * normalised]
    after = CifarB(norm=BatchNorm, places=("after",))
    assert sizes(after) == [1_250_858 + 2 * normalised, 2 * normalised]


@pytest.mark.parametrize("places", [("before",), ("after",), ("input",), ("input", "after")])
@pytest.mark.parametrize(
    ("family", "layers"), [(CifarA, (32, 32, 64, 64, 128, 128, 512)),
                           (CifarB, (32, 32, 64, 64, 512))],
)  # fmt: skip
def test_every_hidden_layer_but_the_last_of_a_has_a_norm(family, layers, places):
    stats = shapes(family(norm=BatchNorm, places=places))["batch_stats"]
    expected = (3,) * ("input" in places) + layers * (places[-1] != "input")
    assert [stats[f"BatchNorm_{i}"]["mean"] for i in range(len(stats))] == [
        (c,) for c in expected
    ]


def written_out(family, params, places):
    """Loss (sum of squared outputs) in torch, and its gradients; statistics of the batch."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    p = jax.tree.map(lambda v: torch.tensor(np.float64(v), requires_grad=True), params)
    conv, dense, norm = (
        iter([p[name] for name in sorted(p) if name.startswith(kind)])
        for kind in ("Conv", "Dense", "BatchNorm")
    )

    def normalised(x, place):
        if place not in places:
            return x
        layer = next(norm)
        return f.batch_norm(x, None, None, layer["scale"], layer["bias"], training=True)

    def hidden(x):
        return normalised(f.relu(normalised(x, "before")), "after")

    def linear(x, layer):
        return f.linear(x, layer["kernel"].T, layer.get("bias"))

    x = torch.tensor(np.float64(IMAGES)).permute(0, 3, 1, 2)
    x = normalised(x, "input")
    for _ in range(2):
        for padding in (1, 1 if family is CifarA else 0):
            layer = next(conv)
            kernel = layer["kernel"].permute(3, 2, 0, 1)
            x = hidden(f.conv2d(x, kernel, layer.get("bias"), padding=padding))
        x = f.max_pool2d(x, 2)
    x = hidden(linear(x.permute(0, 2, 3, 1).flatten(1), next(dense)))
    x = f.relu(linear(x, next(dense))) if family is CifarA else x
    loss = linear(x, next(dense)).square().sum()
    loss.backward()
    return loss.item(), jax.tree.map(lambda v: v.grad.numpy(), p)


@pytest.mark.parametrize(
    ("family", "places"), [(CifarA, ("after",)), (CifarB, ("input", "before"))]
)
def test_loss_and_gradients_are_those_of_torch(family, places):
    model = family(SMALL[family], 4, norm=BatchNorm, places=places, dropout=0.0)
    variables = randomised(model)

    @jit
    @jax.value_and_grad
    def loss(params):
        given = variables | {"params": params}
        out, _ = model.apply(given, IMAGES, train=True, mutable=["batch_stats"])
        return (out**2).sum()

    value, grads = loss(variables["params"])
    expected, expected_grads = written_out(family, variables["params"], places)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, layer in expected_grads.items():
        for k, v in layer.items():
            np.testing.assert_allclose(grads[name][k], v, atol=1e-4 * np.abs(v).max())


def test_dropout_is_half_after_a_block_and_in_training_only():
    model = CifarA((16, 200, 5), 4, activation="sigmoid")

    @jit
    def outputs(key):
        """Of the two dropouts, without and with training."""
        variables = model.init(key, IMAGES, train=False)
        apply = functools.partial(model.apply, variables, IMAGES, capture_intermediates=True)
        found = [apply(train=train, rngs={"dropout": key})[1] for train in (False, True)]
        return [
            [one["intermediates"][f"Dropout_{i}"]["__call__"][0] for i in range(2)]
            for one in found
        ]

    (block, dense), (dropped_block, dropped_dense) = outputs(jax.random.key(3))
    kept = dropped_block != 0
    np.testing.assert_allclose(dropped_block[kept], block[kept] / 0.75, rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 0.03  # 3 standard deviations
    assert abs((dropped_dense != 0).mean() - 0.5) < 0.05  # 3 standard deviations
    assert (block != 0).all()
    assert (dense != 0).all()


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        (CifarA(), (4, 32, 3), "images of .4, 32, 3. are too small for 3 blocks"),
        (CifarB(), (8, 8, 3), "too small for 2 blocks"),
        (CifarA((8, 8)), (32, 32, 3), "features=.8, 8.: name the channels of one or more"),
        (CifarB((8,)), (32, 32, 3), "features=.8,.: name the channels of one or more"),
        (CifarA(), (32, 3), "images are .n, height, width, channels., not .1, 32, 3."),
    ],
)
def test_what_is_refused(model, image, message):
    with pytest.raises(ValueError, match=message):
        shapes(model, image)
