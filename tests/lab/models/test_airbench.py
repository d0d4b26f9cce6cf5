"""The network of airbench94: its first layer and initial weights, and torch's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.lab.models import Airbench
from bn_jax.lab.models.airbench import VIEWS, partial_identity, whitening_kernel
from bn_jax.linen import BatchNorm

NORM = functools.partial(BatchNorm, momentum=0.6, epsilon=1e-12, use_scale=False, unbiased=True)
# Neighbouring pixels that have much in common.
NOISE = np.random.default_rng(0).normal(size=(7, 13, 13, 3))
IMAGES = np.float32(NOISE[:, 1:, 1:] + NOISE[:, :-1, 1:] + NOISE[:, :-1, :-1])
SMALL = Airbench(4, (5, 7), norm=NORM, whitening=whitening_kernel(jnp.array(IMAGES)), views=6)

# These programs run once, for milliseconds, and take seconds to optimise.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def sizes(model, image=(32, 32, 3)):
    init = functools.partial(model.init, train=False)
    found = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *image)))
    leaves = (jax.tree.leaves(found.get(k, {})) for k in ("params", "batch_stats"))
    return [sum(v.size for v in part) for part in leaves]


@pytest.fixture(scope="module")
def variables():
    """Of the small network, no two biases or statistics of a size."""
    init = jit(functools.partial(SMALL.init, train=False))
    leaves, tree = jax.tree.flatten(init(jax.random.key(1), IMAGES))
    rng = np.random.default_rng(2)
    return tree.unflatten([np.float32(v + rng.uniform(0, 0.3, v.shape)) for v in leaves])


def test_the_counts():
    kernels = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256) + 256 * 10
    biases = 2 * 64 + 4 * 256
    assert kernels + biases + 24 == 1_971_352
    given = Airbench(norm=NORM, whitening=np.zeros((2, 2, 3, 24)))
    assert sizes(given) == [kernels + biases + 24, 2 * biases]
    assert sizes(given.clone(whitening=None)) == [kernels + biases + 24 + 12 * 24, 2 * biases]
    assert sizes(given.clone(norm=None)) == [kernels + biases + 24, 0]


@pytest.mark.parametrize("epsilon", [0, 0.5])
def test_whitened_patches_are_uncorrelated(epsilon):
    kernel = np.float64(whitening_kernel(jnp.array(IMAGES), epsilon))
    parts = [IMAGES[:, i : 11 + i, j : 11 + j] for i in (0, 1) for j in (0, 1)]
    patches = np.float64(np.stack(parts, 3)).reshape(-1, 12)
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]
    found = patches @ kernel.reshape(12, 24)
    np.testing.assert_allclose(found[:, 12:], -found[:, :12])
    second = found[:, :12].T @ found[:, :12] / len(found)
    np.testing.assert_allclose(second, np.diag(values / (values + epsilon)), atol=2e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 4), (4, 4), (40, 400)])
def test_the_first_filters_hand_on_a_channel(inputs, outputs):
    kernel = partial_identity(jax.random.key(0), (3, 3, inputs, outputs))
    x = np.random.default_rng(1).normal(size=(1, 5, 5, inputs)).astype(np.float32)
    names = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)
    handed = min(inputs, outputs)
    np.testing.assert_allclose(y[..., :handed], x[..., :handed], rtol=1e-6)
    drawn, bound = np.asarray(kernel[..., handed:]), 1 / np.sqrt(9 * inputs)
    if drawn.size:  # uniform in +-bound
        assert np.abs(drawn).max() <= bound
        np.testing.assert_allclose(drawn.std(), bound / np.sqrt(3), rtol=0.01)


class Torch:
    """The network in torch, in float64, channels first."""

    def __init__(self, torch, variables):
        def tensor(v):
            return torch.tensor(np.float64(v), requires_grad=True)

        self.torch, self.f = torch, torch.nn.functional
        self.params = jax.tree.map(tensor, variables["params"])
        self.stats = jax.tree.map(
            lambda v: torch.tensor(np.float64(v)), variables["batch_stats"]
        )

    def conv(self, x, kernel, **how):
        return self.f.conv2d(x, kernel.permute(3, 2, 0, 1), **how)

    def normalised(self, x, i, train):
        stats = self.stats[f"BatchNorm_{i}"]
        bias = self.params[f"BatchNorm_{i}"]["bias"]
        return self.f.gelu(
            self.f.batch_norm(x, stats["mean"], stats["var"], None, bias, train, 0.4, 1e-12),
            approximate="tanh",
        )

    def outputs(self, images, train):
        p = self.params
        whitening = self.torch.tensor(np.float64(SMALL.whitening))
        x = self.conv(images, whitening, bias=p["Whitening_0"]["bias"])
        x = self.f.gelu(x, approximate="tanh")
        for i in (0, 2):
            x = self.f.max_pool2d(self.conv(x, p[f"Conv_{i}"]["kernel"], padding=1), 2)
            x = self.normalised(x, i, train)
            x = self.conv(x, p[f"Conv_{i + 1}"]["kernel"], padding=1)
            x = self.normalised(x, i + 1, train)
        return self.f.max_pool2d(x, 2).flatten(1) @ p["Dense_0"]["kernel"] / 9

    def mirrored_too(self, images):
        return (self.outputs(images, False) + self.outputs(images.flip(-1), False)) / 2

    def of_six_views(self, images):
        padded = self.f.pad(images, (1,) * 4, "reflect")
        moved = padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]
        moved = sum(self.mirrored_too(v) for v in moved) / 2
        return (self.mirrored_too(images) + moved) / 2


@pytest.fixture(scope="module")
def written_out(variables):
    torch = pytest.importorskip("torch")
    images = torch.tensor(np.float64(IMAGES)).permute(0, 3, 1, 2)
    return Torch(torch, variables), images


def test_gradients_and_statistics_are_those_of_torch(variables, written_out):
    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        given = variables | {"params": params}
        out, updates = SMALL.apply(given, IMAGES, train=True, mutable=["batch_stats"])
        return (out**2).sum(), updates["batch_stats"]

    (value, stats), grads = loss(variables["params"])
    twin = Torch(written_out[0].torch, variables)
    expected = twin.outputs(written_out[1], True).square().sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())

    jax.tree.map(close, grads, jax.tree.map(lambda v: v.grad.numpy(), twin.params))
    jax.tree.map(close, stats, jax.tree.map(lambda v: v.numpy(), twin.stats))


@pytest.mark.parametrize("views", VIEWS)
def test_views_are_averaged_as_in_torch(variables, written_out, views):
    twin, images = written_out
    expected = {
        1: functools.partial(twin.outputs, train=False), 2: twin.mirrored_too,
        6: twin.of_six_views,
    }[views](images)  # fmt: skip
    model = SMALL.clone(views=views)
    found = jit(functools.partial(model.apply, train=False))(variables, IMAGES)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_masked_examples_do_not_count(variables):
    apply = functools.partial(SMALL.apply, train=True, mutable=["batch_stats"])
    real = np.array([0, 2, 3, 6])
    mask = jnp.zeros(7, bool).at[real].set(True)
    expected, stats = jit(apply)(variables, IMAGES[real])
    found, masked = jit(apply)(variables, IMAGES, mask=mask)
    np.testing.assert_allclose(found[real], expected, rtol=1e-4, atol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, masked, stats)


def test_half_precision_is_of_the_activations_alone(variables):
    model = SMALL.clone(dtype=jnp.bfloat16)
    init = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), IMAGES)
    assert {v.dtype for v in jax.tree.leaves(init)} == {jnp.dtype("float32")}
    found, kept = jit(
        functools.partial(model.apply, train=False, capture_intermediates=True)
    )(variables, IMAGES)  # fmt: skip
    layers = kept["intermediates"]
    assert found.dtype == jnp.float32
    assert {
        layers[k]["__call__"][0].dtype for k in ("Whitening_0", "Conv_1", "BatchNorm_1")
    } == {jnp.dtype("bfloat16")}
    exact = jit(functools.partial(SMALL.apply, train=False))(variables, IMAGES)
    np.testing.assert_allclose(found, exact, atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ((8, 32, 3), "images of .8, 32, 3. are too small for 3 blocks"),
        ((32, 3), "images are .n, height, width, channels., not .1, 32, 3."),
    ],
)
def test_what_is_refused(image, message):
    assert sizes(Airbench(), (9, 9, 3))
    with pytest.raises(ValueError, match=message):
        sizes(Airbench(), image)
