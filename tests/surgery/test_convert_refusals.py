"""What cannot be converted is refused by name; a state_dict is any dict of arrays."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.linen
from bn_jax import cumulative_mean
from bn_jax.surgery import convert

X = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)


def norm(like="torch", kind=bn_jax.linen.BatchNorm, **fields):
    return functools.partial(kind.like, like, use_running_average=True, name="norm", **fields)


class Net(nn.Module):
    """A convolution, a BatchNorm, the mean over positions, a Dense."""

    norm: object = norm()
    padding: object = ((1, 1), (1, 1))
    strides: int = 2
    features: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), self.strides, padding=self.padding, name="conv")(x)
        x = nn.relu(self.norm()(x))
        return nn.Dense(self.features, name="head")(x.mean((1, 2)))


def of(**fields):
    model = Net(**fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    return model, jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), shapes)


def state_dict():
    rng = np.random.default_rng(0)
    shapes = {
        "a.weight": (4, 3, 3, 3), "a.bias": (4,),
        "b.weight": (4,), "b.bias": (4,), "b.running_mean": (4,), "b.running_var": (4,),
        "c.weight": (4, 4), "c.bias": (4,),
    }  # fmt: skip
    arrays = {name: np.float32(rng.uniform(size=shape)) for name, shape in shapes.items()}
    return arrays | {"b.num_batches_tracked": np.int64(7)}


def read(arrays, model_and_variables=None, **options):
    options = {"unchecked": True} | options
    return convert.from_torch(arrays, *(model_and_variables or of()), X, **options)


def without(*names):
    return {k: v for k, v in state_dict().items() if k.partition(".")[0] not in names}


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        (without("c"), r"left over in the Flax model: head"),
        (state_dict() | {"d.weight": np.ones((4, 4))}, r"left over in the other .* model: d"),
        (without("b"), r"c \(Dense or Embed: weight .* and norm \(BatchNorm: .*other kinds"),
        (state_dict() | {"b.weight_g": np.ones(4)}, r"cannot convert b, .*: it has weight_g"),
        (
            state_dict() | {"e.alpha": np.ones(4)},
            r"cannot convert e.alpha: .*skip=\('e.alpha',\)",
        ),
        (
            state_dict() | {"c.weight": np.ones((4, 8))},
            r"c \(.*kernel \(8, 4\).*head \(.*kernel \(4, 4\).*differ.*names=",
        ),
        (
            without("c") | {"c.weight": np.ones((4, 4))},
            r"c \(.*kernel \(4, 4\)\) and head .*bias",
        ),
    ],
)
def test_layers_that_do_not_fit(arrays, match):
    with pytest.raises(ValueError, match=match):
        read(arrays)


def test_names():
    arrays = state_dict()
    names = {"c": "head", "b": "norm", "a": "conv"}
    jax.tree.map(np.testing.assert_array_equal, read(arrays, names=names), read(arrays))
    for wrong, match in (
        ({"a": "conv", "b": "norm"}, r"left over in the other framework's model: c"),
        (
            names | {"z": "conv"},
            r"names has conv, z: pair each of a, b, c, .* conv, norm, head",
        ),
        (names | {"c": "tail"}, r"names has tail"),
        (names | {"c": "conv"}, r"names has conv"),
    ):
        with pytest.raises(ValueError, match=match):
            read(arrays, names=wrong)


def test_shapes_of_what_is_flattened():
    for options, match in (
        ({"flattened": {"z": (1, 2, 2)}}, r"shape is given for z, .*: there are a, b, c"),
        ({"flattened": {"c": (1, 2, 3)}}, r"c has 4 features and the shape .* has 6"),
        ({"flattened": {"a": (1, 2, 2)}}, r"a is a Conv"),
    ):
        with pytest.raises(ValueError, match=match):
            read(state_dict(), **options)


def test_a_count_that_is_wanted():
    cumulative = norm("flax", estimator=cumulative_mean)
    arrays = state_dict()
    got = read(arrays, of(norm=cumulative))["batch_stats"]["norm"]["count"]
    np.testing.assert_array_equal(got, np.full(4, 7))
    del arrays["b.num_batches_tracked"]
    with pytest.raises(ValueError, match=r"b has no number of updates.* norm .*estimator=ema"):
        read(arrays, of(norm=cumulative))
    model, variables = of(norm=cumulative)
    variables["batch_stats"]["norm"]["count"] = jnp.arange(4)
    with pytest.raises(ValueError, match=r"some have 0 updates and some 3"):
        convert.to_torch(state_dict(), model, variables, X, unchecked=True)


def torch_module(**conv):
    torch = pytest.importorskip("torch")
    conv = {"stride": 2, "padding": 1} | conv
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, **conv), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4)
    )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"padding": "SAME"}, r"padding=\(\(1, 1\), .* padding=\(\(0, 1\), \(0, 1\)\)"),
        ({"padding": "CIRCULAR"}, r"padding_mode=ZEROS and conv has padding_mode=CIRCULAR"),
        ({"strides": 1}, r"0 has strides=\(2, 2\) and conv has strides=\(1, 1\)"),
        ({"norm": norm("torch", epsilon=1e-3)}, r"1 has epsilon=1e-05 and norm .*0.001"),
    ],
)
def test_settings_that_differ(fields, match):
    module, template = torch_module(), of(**fields)
    for function in (convert.from_torch, convert.to_torch):
        with pytest.raises(ValueError, match=match):
            function(module, *template, X, unchecked=True)


ghost = norm("torch", bn_jax.linen.GhostBatchNorm)


@pytest.mark.parametrize(
    ("name", "norm", "match"),
    [
        ("momentum", norm("torch", momentum=0.99), r"1 has momentum=0.9 .*0.99"),
        ("unbiased", norm("flax", momentum=0.9), r"1 has unbiased=True .*=False"),
        ("estimator", norm("paper", momentum=0.9), r"1 has estimator=ema .*=cumulative_mean"),
        ("layer", ghost, r"1 has layer=BatchNorm .*=GhostBatchNorm"),
    ],
)
def test_settings_of_training(name, norm, match):
    """They change no output in evaluation: a warning, with the name that silences it."""
    module, template = torch_module(), of(norm=norm)
    for function in (convert.from_torch, convert.to_torch):
        with pytest.warns(UserWarning, match=f"{match}.*in training.*ignore=.'{name}'") as seen:
            function(module, *template, X, unchecked=True)
        assert len(seen) == 1
        function(module, *template, X, unchecked=True, ignore=(name,))


def test_modules():
    torch = pytest.importorskip("torch")
    for layer, match in (
        (torch.nn.PReLU(), r"cannot convert 3.weight of a PReLU"),
        (torch.nn.BatchNorm2d(4, track_running_stats=False), r"3 has no running statistics"),
    ):
        module = torch_module().append(layer)
        with pytest.raises(ValueError, match=match):
            read(module)


def test_grouped_transposed_convolutions():
    """Flax has none, and without a bias the shapes of one fit."""
    torch = pytest.importorskip("torch")
    model = nn.ConvTranspose(2, (3, 3), padding="VALID", use_bias=False)
    x = jax.ShapeDtypeStruct((1, 5, 5, 4), jnp.float32)
    variables = {"params": {"kernel": jnp.zeros((3, 3, 4, 2))}}
    plain = torch.nn.ConvTranspose2d(4, 2, 3, bias=False)
    convert.from_torch(plain, model, variables, x, unchecked=True)
    grouped = torch.nn.ConvTranspose2d(4, 4, 3, bias=False, groups=2)
    with pytest.raises(ValueError, match=r"feature_group_count=2 .*=1"):
        convert.from_torch(grouped, model, variables, x, unchecked=True)


def test_partitioned_parameters_stay_so():
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    model = nn.Dense(2, kernel_init=init)
    variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    arrays = {"weight": np.arange(6.0).reshape(2, 3), "bias": np.ones(2)}
    expected = np.ones((1, 3)) @ arrays["weight"].T + 1
    got = convert.from_torch(arrays, model, variables, jnp.ones((1, 3)), expected=expected)
    got = got["params"]["kernel"]
    assert got.names == ("in", "out")
    np.testing.assert_array_equal(got.unbox(), arrays["weight"].T)


class OfTwo(nnx.Module):
    def __init__(self):
        self.used, self.unused = (nnx.Linear(3, 2, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return self.used(x)


def test_parameters_of_no_layer():
    with pytest.raises(ValueError, match=r"cannot convert unused.*: not called"):
        read(state_dict(), nnx.split(OfTwo()))
