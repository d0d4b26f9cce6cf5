"""Residual networks: torchvision's parameters, and torch's numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.lab.models import NORMS, ResNet, ResNet18, ResNet50
from bn_jax.lab.models.resnet import ResNetBlock
from bn_jax.linen import BatchNorm

# Parameters of torchvision's resnet18 and resnet50, 1000 outputs: conv1 and bn1, layer1 to
# layer4, fc.
TORCHVISION = {
    ResNet18: (9_408 + 128, 147_968, 525_568, 2_099_712, 8_393_728, 513_000),
    ResNet50: (9_408 + 128, 215_808, 1_219_584, 7_098_368, 14_964_736, 2_049_000),
}
TOTAL = {ResNet18: 11_689_512, ResNet50: 25_557_032}
NORM = functools.partial(BatchNorm, momentum=0.5)
TINY = {
    "basic": ResNet(3, norm=NORM, blocks=(1, 2), width=1 / 16, stem="small"),
    "bottleneck": ResNet(3, norm=NORM, blocks=(2, 1), width=1 / 16, bottleneck=True),
}
IMAGES = jax.random.normal(jax.random.key(0), (6, 13, 16, 3))


def shapes(model, image=(224, 224, 3)):
    """Of all variables and intermediate values; nothing is computed."""

    def run(key, images):
        return model.init_with_output(key, images, train=True, capture_intermediates=True)[1]

    return jax.eval_shape(run, jax.random.key(0), jax.ShapeDtypeStruct((2, *image), "float32"))


def size(tree):
    return sum(v.size for v in jax.tree.leaves(tree))


def random_variables(model):
    """As after some training: no scale is 0, no statistic what it starts as."""
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), IMAGES
    )
    rng = np.random.default_rng(1)

    def draw(path, v):
        if path[-1].key in ("scale", "var"):
            return jnp.float32(rng.uniform(0.5, 1.5, v.shape))
        fan_in = max(1, np.prod(v.shape[:-1]))
        return jnp.float32(rng.normal(0, fan_in**-0.5, v.shape))

    return jax.tree_util.tree_map_with_path(draw, variables)


@pytest.mark.parametrize("family", TORCHVISION)
def test_every_stage_has_the_parameters_of_torchvision(family):
    found = shapes(family(norm=BatchNorm))
    params, stages = found["params"], {}
    for name, layer in params.items():
        first, number, *_ = name.split("_")
        part = f"stage {number}" if first == "stage" else first
        stages[part] = stages.get(part, 0) + size(layer)
    stem = stages.pop("Conv") + stages.pop("BatchNorm")
    found_sizes = (stem, *(stages[f"stage {i}"] for i in range(1, 5)), stages["Dense"])
    assert found_sizes == TORCHVISION[family]
    assert size(params) == TOTAL[family]
    assert found["intermediates"]["__call__"][0].shape == (2, 1000)


@pytest.mark.parametrize("family", TORCHVISION)
def test_height_and_width_halve_from_stage_to_stage(family):
    found = shapes(family(norm=None))["intermediates"]
    assert found["Conv_0"]["__call__"][0].shape == (2, 112, 112, 64)
    expansion = 4 if family is ResNet50 else 1
    for stage in range(4):
        out = found[f"stage_{stage + 1}_block_1"]["__call__"][0].shape
        side = 56 // 2**stage
        assert out == (2, side, side, 64 * 2**stage * expansion)


def test_the_stride_of_a_bottleneck_is_in_its_3x3():
    found = shapes(ResNet50(norm=None))["intermediates"]["stage_2_block_1"]
    sides = [found[f"Conv_{i}"]["__call__"][0].shape[1] for i in range(4)]
    assert sides == [56, 28, 28, 28]  # 1x1, 3x3, 1x1, the shortcut


def test_without_a_norm_convolutions_have_a_bias():
    biased, normalised = shapes(ResNet50()), shapes(ResNet50(norm=BatchNorm))
    features = size(normalised["batch_stats"]) // 2
    assert size(biased["params"]) == TOTAL[ResNet50] - features
    assert "bias" in biased["params"]["Conv_0"]
    assert "bias" not in normalised["params"]["Conv_0"]


def written_out(model, variables, images, train):
    """Outputs and batch means of every norm, in torch and float64."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    means = {}

    def tensor(v):
        return torch.tensor(np.asarray(v, np.float64))

    def conv(x, path, i, stride=1):
        layer = functools.reduce(dict.get, path, variables["params"])
        stats = functools.reduce(dict.get, path, variables["batch_stats"])[f"BatchNorm_{i}"]
        kernel = tensor(layer[f"Conv_{i}"]["kernel"]).permute(3, 2, 0, 1)
        x = f.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        means[*path, i] = x.mean((0, 2, 3)).numpy()
        return f.batch_norm(
            x, *(tensor(stats[k]) for k in ("mean", "var")),
            *(tensor(layer[f"BatchNorm_{i}"][k]) for k in ("scale", "bias")), train,
        )  # fmt: skip

    x = tensor(images).permute(0, 3, 1, 2)
    x = f.relu(conv(x, (), 0, 2 if model.stem == "imagenet" else 1))
    x = f.max_pool2d(x, 3, 2, padding=1) if model.stem == "imagenet" else x
    strides = (1, 2, 1) if model.bottleneck else (2, 1)
    for stage, count in enumerate(model.blocks):
        for block in range(count):
            path, down = (f"stage_{stage + 1}_block_{block + 1}",), stage > 0 and block == 0
            y = x
            for i, stride in enumerate(strides):
                y = conv(y if i == 0 else f.relu(y), path, i, stride if down else 1)
            differs = y.shape[1] != x.shape[1] or down
            x = conv(x, path, len(strides), 2 if down else 1) if differs else x
            x = f.relu(x + y)
    dense = {k: np.float64(v) for k, v in variables["params"]["Dense_0"].items()}
    return x.mean((2, 3)).numpy() @ dense["kernel"] + dense["bias"], means


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", TINY)
def test_the_network_is_that_of_torch(kind, train):
    model = TINY[kind]
    variables = random_variables(model)
    run = functools.partial(model.apply, train=train, mutable=["batch_stats"])
    out, updates = jax.jit(run)(variables, IMAGES)
    expected, means = written_out(model, variables, IMAGES, train)
    assert expected.std() > 0.1
    np.testing.assert_allclose(out, expected, atol=1e-4 * np.abs(expected).max())
    for (*path, i), mean in means.items():
        old, new = (
            functools.reduce(dict.get, path, v["batch_stats"])[f"BatchNorm_{i}"]["mean"]
            for v in (variables, updates)
        )
        wanted = (old + mean) / 2 if train else old
        np.testing.assert_allclose(new, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TINY)
def test_bfloat16_keeps_parameters_and_statistics_in_float32(kind):
    model = TINY[kind]
    half, variables = model.clone(dtype=jnp.bfloat16), random_variables(model)

    @jax.jit
    def both(variables):
        run = {"train": True, "mutable": ["batch_stats", "intermediates"]}
        return (
            model.apply(variables, IMAGES, **run),
            half.apply(variables, IMAGES, capture_intermediates=True, **run),
        )

    (expected, stats), (out, updates) = both(variables)
    floats = {v.dtype for v in jax.tree.leaves((updates["batch_stats"], out))}
    assert floats == {jnp.dtype("float32")}
    inner = updates["intermediates"]
    del inner["__call__"], inner["Dense_0"]
    assert {v.dtype for v in jax.tree.leaves(inner)} == {jnp.dtype("bfloat16")}
    assert {v.dtype for v in jax.tree.leaves(shapes(half)["params"])} == floats
    largest = np.abs(expected).max()
    difference = np.abs(out - expected).max() / largest
    assert 1e-5 < difference < 5e-2  # bfloat16's unit is 4e-3
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=5e-2, atol=5e-2),
        updates["batch_stats"], stats["batch_stats"],
    )  # fmt: skip


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("norm", [BatchNorm, nn.LayerNorm])
def test_blocks_start_as_their_shortcuts(norm, bottleneck):
    x = IMAGES[..., :1] * jnp.ones(8).reshape(1, 1, 1, 8)
    for zero in (True, False):
        block = ResNetBlock(
            8 // (4 if bottleneck else 1), norm=norm, bottleneck=bottleneck, zero_init_last=zero
        )
        y, _ = block.init_with_output(jax.random.key(1), x, train=False)
        assert np.array_equal(y, nn.relu(x)) == zero


@pytest.mark.parametrize("norm", NORMS)
def test_any_norm(norm):
    """Also one that has neither the fields that a network passes on, nor statistics."""
    for model in TINY.values():
        found = shapes(model.clone(norm=NORMS[norm], dtype=jnp.bfloat16), IMAGES.shape[1:])
        assert found["intermediates"]["__call__"][0].shape == (2, 3)
        layers = [name for name in found["params"]["stage_1_block_1"] if "Conv" not in name]
        assert len(layers) == (0 if norm == "none" else 2 + model.bottleneck * 2)
        assert ("batch_stats" in found) == (norm == "bn")


def test_masked_examples_do_not_count():
    model, real = TINY["basic"], np.array([0, 2, 3, 5])
    variables = random_variables(model)

    def loss(params, images, mask, rows):
        out, updates = model.apply(
            {**variables, "params": params}, images, train=True, mask=mask,
            mutable=["batch_stats"],
        )  # fmt: skip
        return (out[rows] ** 2).sum(), (out[rows], updates)

    grad = jax.jit(jax.grad(loss, has_aux=True))
    mask = jnp.zeros(6, bool).at[real].set(True)
    expected = grad(variables["params"], IMAGES[real], None, np.arange(4))
    found = grad(variables["params"], IMAGES, mask, real)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())

    jax.tree.map(close, found, expected)
    everyone = grad(variables["params"], IMAGES, jnp.ones(6, bool), real)
    with pytest.raises(AssertionError):
        jax.tree.map(close, everyone, expected)


def test_what_is_refused():
    with pytest.raises(ValueError, match="stem='large': choose imagenet or small"):
        shapes(ResNet18(stem="large"))
    with pytest.raises(ValueError, match=r"\[n, height, width, channels\], not \(2, 9\)"):
        shapes(ResNet18(), (9,))
