"""Kinds of layers and orders of features that `convert_peers` has not, beside torch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import assert_close

import bn_jax.linen
from bn_jax.surgery import convert

pytestmark = pytest.mark.usefixtures("x64")
torch = pytest.importorskip("torch")
T = torch.nn
IDS = np.random.default_rng(0).integers(0, 7, size=(6, 4))
VECTORS = np.random.default_rng(1).normal(size=(5, 3))


def of_flax(model, x):
    variables = model.init(jax.random.key(0), x)
    return model, jax.tree.map(lambda v: v.astype(jnp.float64), variables)


def assert_back(foreign, model, variables, x, **options):
    """To torch again, to the bit."""
    back = convert.to_torch(foreign, model, variables, x, **options)
    for name, v in (foreign if isinstance(foreign, dict) else foreign.state_dict()).items():
        np.testing.assert_array_equal(back[name], v.numpy())


class Words(nn.Module):
    """An Embed, and attention's projections: DenseGenerals of several axes."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 6)(ids)
        x = nn.LayerNorm(epsilon=1e-5)(nn.GroupNorm(num_groups=2, epsilon=1e-5)(x))
        x = nn.DenseGeneral((2, 4))(x)
        x = nn.DenseGeneral(6, axis=(-2, -1))(jnp.tanh(x))
        x = nn.Conv(8, (3,))(x)
        x = nn.BatchNorm(use_running_average=True, momentum=0.9)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_embeddings_projections_and_a_convolution_of_rank_1():
    foreign = T.Sequential(
        T.Embedding(7, 6), T.GroupNorm(2, 6), T.LayerNorm(6), T.Linear(6, 8), T.Linear(8, 6),
        T.Conv1d(6, 8, 3, padding=1), T.BatchNorm1d(8), T.Linear(32, 3),
    ).double().eval()  # fmt: skip
    foreign[6].running_mean.normal_()
    h = foreign[1](foreign[0](torch.tensor(IDS)).swapaxes(1, 2)).swapaxes(1, 2)
    h = foreign[4](torch.tanh(foreign[3](foreign[2](h)))).swapaxes(1, 2)
    want = foreign[7](foreign[6](foreign[5](h)).flatten(1)).detach().numpy()
    model, template = of_flax(Words(), IDS)
    values = dict(foreign.state_dict())
    variables, found = convert.from_torch(
        values, model, template, IDS, expected=want, with_differences=True, tolerance=1e-11
    )
    assert found.keys() == {"output"}
    assert_close(model.apply(variables, IDS), want, 1e-11)
    said = {"flattened": {"7": (8, 4)}, "unchecked": True}
    assert_back(values, model, variables, IDS, **said)


class Decoder(nn.Module):
    """A vector becomes an image and a vector again, with norms of the vectors."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(bn_jax.linen.BatchNorm, use_running_average=True)
        x = norm()(nn.Dense(12)(x)).reshape(-1, 2, 2, 3)
        x = nn.Conv(4, (1, 1))(x).reshape(len(x), -1)
        return nn.Dense(2)(norm()(x))


def test_vectors_and_images():
    foreign = T.Sequential(
        T.Linear(3, 12), T.BatchNorm1d(12), T.Unflatten(1, (3, 2, 2)), T.Conv2d(3, 4, 1),
        T.Flatten(), T.BatchNorm1d(16), T.Linear(16, 2),
    ).double().eval()  # fmt: skip
    for i in (1, 5):
        foreign[i].running_mean.normal_(), T.init.normal_(foreign[i].weight)
    model, template = of_flax(Decoder(), VECTORS)
    values, image, after = dict(foreign.state_dict()), (3, 2, 2), (4, 2, 2)
    want = foreign(torch.tensor(VECTORS)).detach().numpy()
    said = {"unflattened": {"0": image, "1": image}, "flattened": {"5": after, "6": after}}
    ignored = {"ignore": ("momentum", "unbiased")}
    for source, options in ((values, said | {"unchecked": True}), (foreign, ignored)):
        variables = convert.from_torch(source, model, template, VECTORS, **options)
        assert_close(model.apply(variables, VECTORS), want, 1e-11)
        assert_back(source, model, variables, VECTORS, **options)
    for argument, name in (("unflattened", "0"), ("unflattened", "1"), ("flattened", "5")):
        less = said | {argument: {k: v for k, v in said[argument].items() if k != name}}
        with pytest.raises(ValueError, match=f"{name}: its features.*{argument}="):
            convert.from_torch(values, model, template, VECTORS, unchecked=True, **less)


def channels(x):
    """A convolution of each channel, all channels twice, and a Dense on each position."""
    x = nn.Conv(4, (2, 2), feature_group_count=2, padding="VALID")(x)
    return nn.Dense(3)(jnp.concatenate([x, x], -1)).reshape(len(x), -1)


class Channels(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(channels(x))


class ChannelsOfTorch(T.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mix = T.Conv2d(2, 4, 2, groups=2), T.Linear(8, 3)
        self.head = T.Linear(27, 2)

    def forward(self, x):
        x = self.conv(x)
        x = self.mix(torch.cat([x, x], 1).movedim(1, -1)).movedim(-1, 1)
        return self.head(x.flatten(1))


def test_a_dense_on_every_position_before_a_flattening():
    """Its inputs have a channel twice, at one position: they are not flattened."""
    x = np.random.default_rng(2).normal(size=(3, 4, 4, 2))
    model, template = of_flax(Channels(), x)
    foreign = ChannelsOfTorch().double()
    _, found = convert.from_torch(
        foreign, model, template, x, with_differences=True, tolerance=1e-11
    )
    assert found["output"] < 1e-11
