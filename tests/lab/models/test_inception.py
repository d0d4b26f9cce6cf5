"""BN-Inception: counted and laid out by hand from figure 5, and torch's numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.lab.models import NORMS, Inception
from bn_jax.lab.models.inception import local_response_norm
from bn_jax.lab.models.pooling import avg_pool, max_pool
from bn_jax.linen import BatchNorm

# Height, channels of the output, and of every branch: 1x1, (1x1, 3x3), (1x1, 3x3, 3x3),
# after the pooling. The channels of a branch end in what is joined.
FIGURE_5 = {
    "3a": (28, 256, ((64,), (64, 64), (64, 96, 96), (32,))),
    "3b": (28, 320, ((64,), (64, 96), (64, 96, 96), (64,))),
    "3c": (14, 576, ((128, 160), (64, 96, 96))),
    "4a": (14, 576, ((224,), (64, 96), (96, 128, 128), (128,))),
    "4b": (14, 576, ((192,), (96, 128), (96, 128, 128), (128,))),
    "4c": (14, 576, ((160,), (128, 160), (128, 160, 160), (96,))),
    "4d": (14, 576, ((96,), (128, 192), (160, 192, 192), (96,))),
    "4e": (7, 1024, ((128, 192), (192, 256, 256))),
    "5a": (7, 1024, ((352,), (192, 320), (160, 224, 224), (128,))),
    "5b": (7, 1024, ((352,), (192, 320), (192, 224, 224), (128,))),
}
TINY = functools.partial(Inception, 4, width=1 / 32, stem="small", blocks=("3c", "5b"))
IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))

# These programs run once, for milliseconds, and take seconds to optimise.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shapes(model, image=(224, 224, 3), train=False):
    """Of all variables and intermediate values; nothing is computed."""

    def run(key, images):
        rngs = {"params": key, "dropout": key}
        return model.init_with_output(rngs, images, train=train, capture_intermediates=True)[1]

    found = jax.eval_shape(run, jax.random.key(0), jnp.zeros((2, *image)))
    return jax.tree.map(lambda v: v.shape, found)


def size(tree):
    return sum(np.prod(v) for v in jax.tree.leaves(tree, is_leaf=lambda v: type(v) is tuple))


def by_hand():
    """Kernels' parameters, and channels of all convolutions; of 1,000 classes and RGB."""
    kernels, normalised = 8 * 7 * 7 * 3 + 24 * 64 + 64 * 64 + 3 * 3 * 64 * 192, 64 + 64 + 192
    inputs = 192
    for _, outputs, branches in FIGURE_5.values():
        for branch in branches:
            for before, after, area in zip((inputs, *branch), branch, (1, 9, 9), strict=False):
                kernels += area * before * after
                normalised += after
        inputs = outputs
    return kernels + 1000 * (1024 + 1), normalised


def test_parameters_are_those_of_figure_5():
    weights, channels = by_hand()
    plain, normalised, after = (
        shapes(m) for m in (Inception(), Inception(norm=BatchNorm),
                            Inception(norm=BatchNorm, places=("after",)))
    )  # fmt: skip
    assert size(plain["params"]) == weights + channels
    assert size(normalised["params"]) == weights + 2 * channels
    assert size(after["params"]) == weights + 3 * channels
    assert size(normalised["batch_stats"]) == size(after["batch_stats"]) == 2 * channels
    assert round((weights + 2 * channels) / 1e6, 1) == 11.2


def test_every_output_has_the_shape_in_figure_5():
    found = shapes(Inception())["intermediates"]
    for name, (height, channels, branches) in FIGURE_5.items():
        block = found[f"block_{name}"]
        assert block["__call__"] == ((2, height, height, channels),)
        convolutions = [block[f"Conv_{i}"]["__call__"][0][-1] for i in range(len(block) - 1)]
        assert sorted(convolutions) == sorted(c for branch in branches for c in branch)
    stem = [found[f"Conv_{i}"]["__call__"][0] for i in range(4)]
    assert stem == [(2, 112, 112, 24), (2, 112, 112, 64), (2, 56, 56, 64), (2, 56, 56, 192)]
    assert found["__call__"] == ((2, 1000),)


def test_a_narrow_network_of_small_images():
    found = shapes(
        Inception(10, width=0.25, stem="small", blocks=("3c", "4a", "4e", "5b")), (32, 32, 3)
    )["intermediates"]
    assert found["Conv_0"]["__call__"] == ((2, 16, 16, 16),)
    blocks = {
        name: found[f"block_{name}"]["__call__"][0][1:] for name in ("3c", "4a", "4e", "5b")
    }
    assert blocks == {
        "3c": (8, 8, (160 + 96) // 4 + 16), "4a": (8, 8, 576 // 4),
        "4e": (4, 4, (192 + 256 + 576) // 4), "5b": (4, 4, 1024 // 4),
    }  # fmt: skip


def test_channels_are_multiples_of_four():
    found = shapes(TINY(width=0.1), (8, 8, 3))["params"]
    widths = [
        v["kernel"][-1] for block in ("3c", "5b") for v in found[f"block_{block}"].values()
    ]
    expected = [128, 160, 64, 96, 96, 352, 192, 320, 192, 224, 224, 128]
    assert sorted(widths) == sorted(4 * round(c / 40) for c in expected)
    assert found["Conv_0"]["kernel"] == (3, 3, 3, 8)
    assert shapes(TINY(width=0.001), (8, 8, 3))["params"]["Conv_0"]["kernel"] == (3, 3, 3, 4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("places", [("before",), ("input",), ("input", "before", "after")])
def test_every_convolution_has_its_norms(norm, places):
    found = shapes(TINY(norm=NORMS[norm], places=places), (8, 8, 3), train=True)["params"]
    each = 0 if norm == "none" else ("before" in places) + ("after" in places)
    for name, convolutions in (("3c", 5), ("5b", 7)):
        layers = found[f"block_{name}"]
        assert len(layers) == (1 + each) * convolutions
        biased = ["bias" in v for k, v in layers.items() if k.startswith("Conv")]
        assert biased == [norm == "none" or "before" not in places] * convolutions
    of_input = norm != "none" and "input" in places
    # The convolution of the stem and the output layer, and norms.
    assert len(found) - 2 == 2 + each + of_input


def test_statistics_per_activation_in_the_last_block_alone():
    stats = shapes(TINY(norm=BatchNorm, per_activation_last=True), (8, 8, 3))["batch_stats"]
    last = stats.pop("block_5b")
    assert {v["mean"][:2] for v in last.values()} == {(2, 2)}
    assert {len(v["mean"]) for v in last.values()} == {3}
    others = jax.tree.leaves(stats, is_leaf=lambda v: type(v) is tuple)
    assert {len(v) for v in others} == {1}


def test_local_response_norm_is_the_formula():
    x = np.random.default_rng(0).normal(0, 100, (2, 3, 7))
    expected = np.empty_like(x)
    for i in range(7):
        near = x[..., max(0, i - 2) : i + 3]
        expected[..., i] = x[..., i] / (2 + 1e-4 * (near**2).sum(-1)) ** 0.75
    np.testing.assert_allclose(local_response_norm(jnp.float32(x)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (max_pool, nn.max_pool),
        (avg_pool, functools.partial(nn.avg_pool, count_include_pad=False)),
    ],
    ids=["max", "avg"],
)
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, "SAME"), (3, 2, "SAME"), (2, 2, "VALID")]
)
def test_pooling_is_that_of_flax(ours, theirs, size, stride, padding):
    x = jax.random.normal(jax.random.key(1), (2, 7, 8, 3)) - 3

    @jit
    def both(x):
        y, pullback = jax.vjp(lambda x: ours(x, size, stride, padding), x)
        z, their_pullback = jax.vjp(
            lambda x: theirs(x, (size, size), (stride, stride), padding), x
        )
        return y, z, pullback(jnp.sin(z)), their_pullback(jnp.sin(z))

    y, z, dx, their_dx = both(x)
    np.testing.assert_allclose(y, z, rtol=1e-5)
    np.testing.assert_allclose(dx, their_dx, rtol=1e-5, atol=1e-6)


def written_out(params, blocks, images):
    """The network without a norm and with local response normalisation, in torch."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional

    def padded(x, size, stride, value=0.0):
        total = (-(-x.shape[-1] // stride) - 1) * stride + size - x.shape[-1]
        low, high = total // 2, total - total // 2
        return f.pad(x, (low, high, low, high), value=value)

    def linear(x, layer, stride=1):
        kernel = torch.tensor(np.float64(layer["kernel"])).permute(3, 2, 0, 1)
        bias = torch.tensor(np.float64(layer["bias"])) if "bias" in layer else None
        groups = x.shape[1] // kernel.shape[1]
        return f.conv2d(
            padded(x, kernel.shape[-1], stride), kernel, bias, stride, groups=groups
        )

    def conv(x, *layers, stride=1):
        for layer in layers[:-1]:
            x = f.relu(linear(x, layer))
        return f.relu(linear(x, layers[-1], stride))

    def pool(x, stride):
        return f.max_pool2d(padded(x, 3, stride, -np.inf), 3, stride)

    def across_channels(x):  # torch divides alpha by the number of channels
        return f.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2)

    c = [params[f"Conv_{i}"] for i in range(4)]
    x = linear(torch.tensor(np.float64(images)).permute(0, 3, 1, 2), c[0], stride=2)
    x = across_channels(pool(conv(x, c[1]), 2))
    x = pool(across_channels(conv(x, c[2], c[3])), 2)
    for name in blocks:
        c = [params[f"block_{name}"][f"Conv_{i}"] for i in range(len(params[f"block_{name}"]))]
        if name == "3c":
            branches = [conv(x, *c[:2], stride=2), conv(x, *c[2:], stride=2), pool(x, 2)]
        else:
            average = f.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
            pooled = average if name == "3a" else pool(x, 1)
            branches = [conv(x, c[0]), conv(x, *c[1:3]), conv(x, *c[3:6]), conv(pooled, c[6])]
        x = torch.cat(branches, 1)
    return np.asarray(x.mean((2, 3))) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


def test_the_network_is_that_of_torch():
    blocks = ("3a", "3c", "5b")
    model = Inception(4, width=1 / 16, blocks=blocks, local_response_norm=True)
    images = 200 * jax.random.normal(jax.random.key(1), (2, 40, 40, 3))
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda shape: np.float32(rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape)),
        shapes(model, (40, 40, 3))["params"],
        is_leaf=lambda v: type(v) is tuple,
    )
    out = jit(functools.partial(model.apply, train=False))({"params": params}, images)
    expected = written_out(params, blocks, images)
    np.testing.assert_allclose(out, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.long
def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    model = Inception(
        4, norm=BatchNorm, places=("before", "after"), width=1 / 32, blocks=("3a", "5b"),
        local_response_norm=True,
    )  # fmt: skip
    half = model.clone(dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))

    @jit
    def run(key):
        variables = model.init(key, images, train=False)
        call = {"train": True, "mutable": ["batch_stats", "intermediates"]}
        return (
            model.apply(variables, images, **call),
            half.apply(variables, images, capture_intermediates=True, **call),
            half.init(key, images, train=False)["params"],
        )

    (expected, stats), (out, updates), params = run(jax.random.key(0))
    kept = (params, updates["batch_stats"], out)
    assert {v.dtype for v in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    inner = updates["intermediates"]
    del inner["__call__"], inner["Dropout_0"], inner["Dense_0"]
    assert {v.dtype for v in jax.tree.leaves(inner)} == {jnp.dtype("bfloat16")}
    difference = np.abs(out - expected).max() / np.abs(expected).max()
    assert 1e-5 < difference < 0.1  # bfloat16's unit is 4e-3
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0.1, atol=0.1),
        updates["batch_stats"], stats["batch_stats"],
    )  # fmt: skip


def test_gradients_are_finite_and_dropout_is_for_training():
    model = TINY(norm=BatchNorm, dropout=0.5, local_response_norm=True,
                 per_activation_last=True, blocks=("5b",))  # fmt: skip

    @jit
    def run(keys):
        variables = model.init(keys[0], IMAGES, train=False)

        def loss(params, key):
            out, _ = model.apply(
                variables | {"params": params}, IMAGES, train=True,
                rngs={"dropout": key}, mutable=["batch_stats"],
            )  # fmt: skip
            return -jax.nn.log_softmax(out)[:, 0].mean()

        losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(variables["params"], keys)
        # Without a random stream there is no dropout.
        model.apply(variables, IMAGES, train=False)
        return losses, grads

    losses, grads = run(jax.random.split(jax.random.key(1)))
    assert losses[0] != losses[1]
    assert all(np.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Inception(stem="large"), "stem='large': choose imagenet or small"),
        (Inception(blocks=("3a", "6a")), "no block '6a': choose from 3a, 3b"),
        (Inception(per_activation_last=True), "per_activation_last=True needs a norm"),
    ],
)
def test_what_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        shapes(model)


@pytest.mark.parametrize(
    ("model", "image", "least"),
    [
        (Inception(), (31, 64, 3), 32),
        (Inception(), (64, 31, 3), 32),
        (Inception(stem="small"), (7, 7, 3), 8),
        (Inception(blocks=("3a", "3c")), (15, 15, 3), 16),
    ],
)
def test_an_image_smaller_than_the_product_of_the_strides_is_refused(model, image, least):
    with pytest.raises(ValueError, match=f"strides want {least}x{least}: choose larger"):
        shapes(model, image)


def test_other_than_images_is_refused():
    with pytest.raises(ValueError, match=r"\[n, height, width, channels\], not \(2, 9\)"):
        shapes(Inception(), (9,))
