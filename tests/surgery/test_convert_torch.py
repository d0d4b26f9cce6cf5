"""Networks from torch and back, beside torch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_networks import MORE, SHAPE, TORCH_PADS, X, call, filled, linen, of_nnx
from layers import assert_close

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import convert

pytestmark = pytest.mark.usefixtures("x64")


def torch_network(seed=0, output_padding=(1, 0)):
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    t = torch.nn
    model = t.Sequential(
        t.Conv2d(3, 6, 3, padding=1, bias=False), t.BatchNorm2d(6), t.ReLU(),
        t.Conv2d(6, 12, 3, padding=1, groups=6), t.BatchNorm2d(12), t.ReLU(),
        t.ConvTranspose2d(12, 8, (3, 4), 2, padding=1, output_padding=output_padding),
        t.BatchNorm2d(8), t.ReLU(), t.Flatten(), t.Linear(512, 9), t.ReLU(),
        t.Linear(9, 5),
    )  # fmt: skip
    for layer in model:
        if hasattr(layer, "running_mean"):
            t.init.normal_(layer.weight), t.init.normal_(layer.bias)
    return model.double()


def torch_call(model, x, train=False):
    torch = pytest.importorskip("torch")
    x = torch.tensor(np.moveaxis(x, -1, 1))
    return model.train(train)(x).detach().numpy()


FLAT = {"flattened": {"10": SHAPE}}


def of_torch(kind):
    return (
        of_nnx(TORCH_PADS)
        if kind == "nnx"
        else linen("torch", pads=TORCH_PADS, transpose_kernel=kind == "transposed")
    )


@pytest.mark.parametrize("kind", ["linen", "transposed", "nnx"])
@pytest.mark.parametrize(
    "read", [lambda m: m, lambda m: m.state_dict()], ids=["module", "state_dict"]
)
def test_torch(kind, read):
    foreign = torch_network()
    torch_call(foreign, X, train=True)
    model, template = of_torch(kind)
    variables = convert.from_torch(read(foreign), model, template, X, **FLAT)
    assert jax.tree.structure(variables) == jax.tree.structure(template)
    assert_close(call(model, variables, X)[0], torch_call(foreign, X), 1e-11)
    for x in MORE:
        y, variables = call(model, variables, x, train=True)
        assert_close(y, torch_call(foreign, x, train=True), 1e-11)
    back = torch_network(seed=1)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    state = convert.to_torch(read(back), model, variables, shape, **FLAT)
    torch = pytest.importorskip("torch")
    back.load_state_dict({name: torch.tensor(v) for name, v in state.items()})
    for got in (torch_call(back, X), call(model, variables, X)[0]):
        assert_close(got, torch_call(foreign, X), 1e-11)
    again = convert.from_torch(read(back), model, template, X, **FLAT)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


IDS = np.random.default_rng(0).integers(0, 7, size=(6, 4))


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
    torch = pytest.importorskip("torch")
    t = torch.nn
    foreign = t.Sequential(
        t.Embedding(7, 6), t.GroupNorm(2, 6), t.LayerNorm(6), t.Linear(6, 8), t.Linear(8, 6),
        t.Conv1d(6, 8, 3, padding=1), t.BatchNorm1d(8), t.Linear(32, 3),
    ).double().eval()  # fmt: skip
    foreign[6].running_mean.normal_()
    h = foreign[1](foreign[0](torch.tensor(IDS)).swapaxes(1, 2)).swapaxes(1, 2)
    h = foreign[4](torch.tanh(foreign[3](foreign[2](h)))).swapaxes(1, 2)
    want = foreign[7](foreign[6](foreign[5](h)).flatten(1)).detach().numpy()
    model = Words()
    template = filled(jax.eval_shape(model.init, jax.random.key(0), IDS))
    said = {"flattened": {"7": (8, 4)}}
    # The unbiased variances that torch's average is of a Flax BatchNorm has not.
    with pytest.raises(ValueError, match=r"6 has unbiased=True and BatchNorm_0 has .*False"):
        convert.from_torch(foreign, model, template, IDS, **said)
    values = foreign.state_dict()
    variables = convert.from_torch(values, model, template, IDS, **said)
    assert_close(model.apply(variables, IDS), want, 1e-11)
    back = convert.to_torch(values, model, variables, IDS, **said)
    for name, v in values.items():
        np.testing.assert_array_equal(back[name], v.numpy())


class Decoder(nn.Module):
    """A vector becomes an image and a vector again, with norms of the vectors."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(bn_jax.linen.BatchNorm, use_running_average=True)
        x = norm()(nn.Dense(12)(x)).reshape(-1, 2, 2, 3)
        x = nn.Conv(4, (1, 1))(x).reshape(len(x), -1)
        return nn.Dense(2)(norm()(x))


def test_vectors_and_images():
    torch = pytest.importorskip("torch")
    t = torch.nn
    foreign = t.Sequential(
        t.Linear(3, 12), t.BatchNorm1d(12), t.Unflatten(1, (3, 2, 2)), t.Conv2d(3, 4, 1),
        t.Flatten(), t.BatchNorm1d(16), t.Linear(16, 2),
    ).double().eval()  # fmt: skip
    for i in (1, 5):
        foreign[i].running_mean.normal_(), t.init.normal_(foreign[i].weight)
    x = np.random.default_rng(1).normal(size=(5, 3))
    model = Decoder()
    template = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    values, image, after = foreign.state_dict(), (3, 2, 2), (4, 2, 2)
    said = {"unflattened": {"0": image, "1": image}, "flattened": {"5": after, "6": after}}
    variables = convert.from_torch(values, model, template, x, **said)
    want = foreign(torch.tensor(x)).detach().numpy()
    assert_close(model.apply(variables, x), want, 1e-11)
    back = convert.to_torch(values, model, variables, x, **said)
    for name, v in values.items():
        np.testing.assert_array_equal(back[name], v.numpy())
    for argument, name in (("unflattened", "0"), ("unflattened", "1"), ("flattened", "5")):
        less = said | {argument: {k: v for k, v in said[argument].items() if k != name}}
        with pytest.raises(ValueError, match=f"{name}: its features.*{argument}="):
            convert.from_torch(values, model, template, x, **less)
