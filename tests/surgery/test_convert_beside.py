"""What can be run is run: networks of other people's design are right, or refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_peers import (
    IMAGES,
    PEERS,
    VECTORS,
    Own,
    OwnOfFlax,
    ResNet,
    ResNetOfFlax,
    T,
    conv,
    flat,
    norm,
    of_flax,
    of_torch,
    outputs,
    torch,
)  # fmt: skip
from flax import nnx
from layers import assert_close

import bn_jax.linen
from bn_jax.surgery import Adapter, convert


@pytest.mark.parametrize("peer", PEERS)
def test_peers(peer):
    make, make_ours, inputs = PEERS[peer]
    foreign = of_torch(make)
    model, template = of_flax(make_ours, *inputs)
    variables, found = convert.from_torch(
        foreign, model, template, *inputs, with_differences=True
    )
    got, want = model.apply(variables, *inputs), outputs(foreign, *inputs)
    turned = jax.tree.map(lambda a, b: b if a.ndim < 4 else np.moveaxis(b, 1, -1), got, want)
    assert_close(got, turned, 1e-5)
    assert len(found) == len(jax.tree.leaves(want))
    assert max(found.values()) < 1e-5
    back = convert.to_torch(of_torch(make, seed=1), model, variables, *inputs)
    for name, v in foreign.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[name], v.numpy())


def sequential(*layers):
    return of_torch(lambda: T.Sequential(*layers))


class Standardised(T.Conv2d):
    """Weight standardisation, whose parameters are a Conv2d's."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w, self.bias)


def conv_1(*more):
    return lambda: T.Sequential(T.Conv2d(2, 4, 1), *more)


@pytest.mark.parametrize(
    ("foreign", "ours", "match"),
    [
        (lambda: Standardised(2, 4, 3, padding=1), conv(4), r"Standardised taken for a Conv"),
        (
            lambda: T.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), conv(4),
            r"the layer has padding_mode=CIRCULAR and .*=ZEROS",
        ),
        (
            lambda: T.Conv2d(2, 4, 5, padding=1, padding_mode="reflect"),
            nn.Conv(4, (5, 5), padding="REFLECT"),
            r"of shape .* there.*padding=\(\(1, 1\), \(1, 1\)\) and .*=\(\(2, 2\), \(2, 2\)\)",
        ),
        (
            conv_1(T.GELU()), conv(4, 1),
            r"output is off by .* of .*tolerance 1e-05.*names=.*flattened=",
        ),
        (
            conv_1(T.LogSigmoid(), T.Softplus(1, -1e9)),
            nn.Sequential([conv(4, 1), nn.log_sigmoid, jnp.sqrt]), r"output is not finite",
        ),
        (conv_1(T.Flatten(2)), conv(4, 1), r"of shape .*there"),
        (conv_1(T.Unflatten(1, (3, 3))), conv(4, 1), r"cannot be run .*sample \(RuntimeError"),
    ],
)  # fmt: skip
def test_what_differs_is_refused(foreign, ours, match):
    template = of_flax(lambda: ours, IMAGES)
    for function in (convert.from_torch, convert.to_torch):
        with pytest.raises(ValueError, match=match):
            function(of_torch(foreign), *template, IMAGES)


def test_a_sample_that_shows_nothing():
    foreign = of_torch(conv_1(T.GELU()))
    T.init.zeros_(foreign[0].bias)
    model, template = of_flax(lambda: nn.Sequential([conv(4, 1), nn.relu]), IMAGES)
    with pytest.raises(ValueError, match=r"off by"):
        convert.from_torch(foreign, model, template, 0 * IMAGES)


class Swapped(T.Module):
    def __init__(self):
        super().__init__()
        self.second, self.first = T.Linear(5, 5), T.Linear(5, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("names", [("first", "second"), ("a", "b"), ("second", "b")])
def test_equal_layers_in_another_order(names):
    """Found by their names, or by the run; with names that mislead too."""

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name=names[1])(nn.relu(nn.Dense(5, name=names[0])(x)))

    foreign = of_torch(Swapped)
    model, template = of_flax(Ours, VECTORS)
    said = {"names": {"first": names[0], "second": names[1]}}
    if names[0] != "first":
        with pytest.raises(ValueError, match=r"off by .*names="):
            convert.from_torch(foreign, model, template, VECTORS)
    for options in ({}, said) if names[0] == "first" else (said,):
        variables = convert.from_torch(foreign, model, template, VECTORS, **options)
        assert_close(model.apply(variables, VECTORS), outputs(foreign, VECTORS), 1e-5)


def test_names_that_mislead():
    """The order is tried where names agree and do not fit."""

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="0")(nn.relu(nn.Dense(5, name="2")(x)))

    foreign = sequential(T.Linear(5, 5), T.ReLU(), T.Linear(5, 5))
    model, template = of_flax(Ours, VECTORS)
    variables = convert.from_torch(foreign, model, template, VECTORS)
    assert_close(model.apply(variables, VECTORS), outputs(foreign, VECTORS), 1e-5)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_a_state_dict(epsilon):
    foreign = of_torch(ResNet)
    for layer in foreign.modules():
        if isinstance(layer, T.BatchNorm2d):
            layer.eps = epsilon
            layer.running_var *= 1e-3
    model, template = of_flax(ResNetOfFlax, IMAGES)
    values, want = foreign.state_dict(), outputs(foreign, IMAGES)
    with pytest.raises(ValueError, match=r"arrays without their model .*unchecked=True"):
        convert.from_torch(values, model, template, IMAGES)
    convert.from_torch(values, model, template, IMAGES, unchecked=True)
    if epsilon == 1e-5:
        variables = convert.from_torch(values, model, template, IMAGES, expected=want)
        assert_close(model.apply(variables, IMAGES), want, 1e-5)
        with pytest.raises(ValueError, match=r"expected= is for from_"):
            convert.to_torch(values, model, variables, IMAGES, expected=want)
    else:
        with pytest.raises(ValueError, match=r"off by"):
            convert.from_torch(values, model, template, IMAGES, expected=want)


def test_shapes_of_inputs():
    foreign = of_torch(ResNet)
    model, template = of_flax(ResNetOfFlax, IMAGES)
    shape = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    with pytest.raises(ValueError, match=r"shapes alone cannot be run.*give arrays"):
        convert.from_torch(foreign, model, template, shape)
    got = convert.from_torch(foreign, model, template, shape, unchecked=True)
    assert_close(model.apply(got, IMAGES), outputs(foreign, IMAGES), 1e-5)


def test_training_mode():
    """The module is run in evaluation, and stays in training; the Flax model must be too."""

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            return bn_jax.linen.BatchNorm.like("torch", use_running_average=not train)(x)

    foreign = of_torch(lambda: T.BatchNorm2d(2)).train()
    before = {name: v.clone() for name, v in foreign.state_dict().items()}
    model, template = of_flax(Ours, IMAGES)
    with pytest.raises(ValueError, match=r"train=False"):
        convert.from_torch(foreign, model, template, IMAGES)
    convert.from_torch(foreign, model, template, IMAGES, train=False)
    assert foreign.training
    for name, v in foreign.state_dict().items():
        np.testing.assert_array_equal(v, before[name])


class TrainingIfMutable(nn.Module):
    """As models on PyPI do: mutable statistics are the word to train."""

    @nn.compact
    def __call__(self, x):
        training = self.is_mutable_collection("batch_stats") and not self.is_initializing()
        return nn.BatchNorm(use_running_average=not training)(nn.Dense(3)(x))


def test_a_model_that_trains_where_statistics_are_mutable():
    foreign = sequential(T.Linear(5, 3), T.BatchNorm1d(3))
    model, template = of_flax(TrainingIfMutable, VECTORS)
    variables = convert.from_torch(
        foreign, model, template, VECTORS, ignore=("unbiased", "momentum")
    )
    assert_close(model.apply(variables, VECTORS), outputs(foreign, VECTORS), 1e-5)


class OwnNorm(nn.Module):
    """A BatchNorm of somebody's own, with names of its own."""

    @nn.compact
    def __call__(self, x):
        leaves = ("mean", zeros), ("var", ones)
        mean, var = (self.variable("batch_stats", f"ra_{n}", f, 3).value for n, f in leaves)
        gamma, beta = self.param("gamma", ones_init, (3,)), self.param("beta", ones_init, (3,))
        return (x - mean[None]) / jnp.sqrt(var[None] + 1e-3) * gamma[None] + beta[None]


zeros, ones, ones_init = jnp.zeros, jnp.ones, nn.initializers.ones
ADAPTER = Adapter(epsilon=1e-3, scale="gamma", bias="beta", mean="ra_mean", var="ra_var")


def test_a_batch_norm_of_another_class():
    foreign = sequential(T.Linear(5, 3), T.BatchNorm1d(3, eps=1e-3))
    model, template = of_flax(lambda: nn.Sequential([nn.Dense(3), OwnNorm()]), VECTORS)
    with pytest.raises(ValueError, match=r"layers_1, a .*OwnNorm.*batch_norms={OwnNorm:"):
        convert.from_torch(foreign, model, template, VECTORS)
    norms = {"batch_norms": {OwnNorm: ADAPTER}}
    variables = convert.from_torch(foreign, model, template, VECTORS, **norms)
    assert_close(model.apply(variables, VECTORS), outputs(foreign, VECTORS), 1e-5)
    back = convert.to_torch(foreign, model, template, VECTORS, **norms)
    again = convert.from_torch(foreign, model, variables, VECTORS, **norms)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    np.testing.assert_array_equal(back["1.running_var"], np.ones(3))
    ours = nn.Sequential([nn.Dense(3), norm(epsilon=1e-3)])
    _, fresh = of_flax(lambda: ours, VECTORS)
    there = convert.to_flax((ours, fresh), model, variables, VECTORS, **norms)
    here = convert.from_flax((ours, there), model, template, VECTORS, **norms)
    jax.tree.map(np.testing.assert_array_equal, here, variables)


@pytest.mark.filterwarnings("error")
def test_an_output_of_zeros():
    foreign = sequential(T.Linear(5, 3), T.ReLU())
    T.init.constant_(foreign[0].bias, -100.0)
    model, template = of_flax(lambda: nn.Sequential([nn.Dense(3), nn.gelu]), VECTORS)
    convert.from_torch(foreign, model, template, VECTORS)
    model = nn.Sequential([nn.Dense(3), jnp.abs])
    with pytest.raises(ValueError, match=r"off by .* of 0 "):
        convert.from_torch(foreign, model, template, VECTORS)


def test_an_order_that_no_output_shows():
    foreign = of_torch(lambda: T.Sequential(T.Conv2d(2, 4, 1), T.Flatten(), T.Linear(96, 3)))
    T.init.zeros_(foreign[0].weight)
    T.init.constant_(foreign[0].bias, 1.0)
    model, template = of_flax(
        lambda: nn.Sequential([nn.Conv(4, (1, 1)), flat, nn.Dense(3)]), IMAGES
    )
    with pytest.raises(ValueError, match=r"do not show the order .* layers_2: .*flattened="):
        convert.from_torch(foreign, model, template, IMAGES)
    variables = convert.from_torch(foreign, model, template, IMAGES, flattened={"2": (4, 4, 6)})
    kernel = variables["params"]["layers_2"]["kernel"]
    want = foreign[2].weight.detach().numpy().reshape(3, 4, 24).transpose(2, 1, 0)
    np.testing.assert_array_equal(kernel, want.reshape(96, 3))


def test_what_the_caller_says():
    foreign = of_torch(Own)
    model, template = of_flax(OwnOfFlax, IMAGES)
    got = convert.from_torch(foreign, model, template, IMAGES, flattened={"head": None})
    assert_close(model.apply(got, IMAGES), outputs(foreign, IMAGES), 1e-5)
    with pytest.raises(ValueError, match=r"off by"):
        convert.from_torch(foreign, model, template, IMAGES, flattened={"head": (4, 4, 6)})
    half = {"params": template["params"] | {"Conv_0": got["params"]["Conv_0"]}}
    again = convert.from_torch(foreign, model, half, IMAGES, skip=("conv", "Conv_0"))
    jax.tree.map(np.testing.assert_array_equal, again, got)


def test_inputs_and_arguments_of_its_own():
    class Scaled(T.Module):
        def __init__(self):
            super().__init__()
            self.layer = T.Linear(5, 4)

        def forward(self, batch, scale=1.0):
            return {"y": scale * self.layer(batch["x"])}

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"y": 2 * nn.Dense(4)(x)}

    foreign = of_torch(Scaled)
    model, template = of_flax(Ours, VECTORS)
    with pytest.raises(ValueError, match=r"cannot be run .*foreign_inputs="):
        convert.from_torch(foreign, model, template, VECTORS)
    for given in (lambda x: ({"x": x},), ({"x": VECTORS},)):
        options = {"foreign_inputs": given, "foreign_call": {"scale": 2.0}}
        _, found = convert.from_torch(
            foreign, model, template, VECTORS, with_differences=True, **options
        )
        assert found["output['y']"] < 1e-6


class Gained(nn.Module):
    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.constant(2.0), (1, 5))
        return nn.Dense(5, name="layer")(x) * gain


class GainedOfTorch(T.Module):
    """A parameter and a buffer of the module's own, at the top and within."""

    def __init__(self, inner=None):
        super().__init__()
        self.gain = T.Parameter(torch.full((5,), 2.0))
        self.register_buffer("steps", torch.zeros(()))
        self.layer = inner or T.Linear(5, 5)

    def forward(self, x):
        return self.layer(x) * self.gain


def test_arrays_of_no_layer():
    foreign = of_torch(GainedOfTorch)
    model, template = of_flax(Gained, VECTORS)
    with pytest.raises(ValueError, match=r"convert gain of a GainedOfTorch, steps .*skip="):
        convert.from_torch(foreign, model, template, VECTORS)
    options = {"skip": ("gain", "st*")}
    variables = convert.from_torch(foreign, model, template, VECTORS, **options)
    assert_close(model.apply(variables, VECTORS), outputs(foreign, VECTORS), 1e-5)
    back = convert.to_torch(foreign, model, variables, VECTORS, **options)
    for name, v in foreign.state_dict().items():
        np.testing.assert_array_equal(back[name], v)
    T.init.constant_(foreign.gain, 3.0)
    with pytest.raises(ValueError, match=r"off by"):
        convert.from_torch(foreign, model, template, VECTORS, **options)
    nested = of_torch(lambda: T.Sequential(GainedOfTorch(GainedOfTorch())))
    with pytest.raises(ValueError, match=r"0.gain .*0.layer.gain .*and 1 more"):
        convert.from_torch(nested, model, template, VECTORS)


class Kernel(nnx.Variable):
    pass


class Dense(nnx.Module):
    """Its kernel is a Variable of the user's, and it has one that holds a dict."""

    def __init__(self, seed):
        self.layer = nnx.Linear(5, 2, rngs=nnx.Rngs(seed))
        self.layer.kernel = Kernel(self.layer.kernel.get_value())
        self.tables = nnx.Variable({"offset": jnp.zeros((1, 2))})

    def __call__(self, x):
        return self.layer(x) + self.tables.get_value()["offset"]


def test_variables_of_other_types():
    (model, values), (_, template) = (nnx.split(Dense(seed)) for seed in range(2))
    state = convert.from_flax((model, values), model, template, VECTORS)
    assert_close(nnx.merge(model, state)(VECTORS), nnx.merge(model, values)(VECTORS), 1e-6)
