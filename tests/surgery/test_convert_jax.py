"""Networks from Haiku, Equinox and Flax, and back, beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_networks import MORE, SHAPE, TORCH_PADS, X, call, linen, of_nnx
from flax import nnx
from layers import assert_close

from bn_jax.surgery import convert

pytestmark = pytest.mark.usefixtures("x64")


def haiku_network():
    hk = pytest.importorskip("haiku")

    def f(x, train):
        def norm(x):
            return jax.nn.relu(hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training=train))

        x = norm(hk.Conv2D(6, 3, with_bias=False)(x))
        x = norm(hk.DepthwiseConv2D(2, 3)(x))
        x = norm(hk.Conv2DTranspose(8, (3, 4), 2)(x))
        x = hk.Linear(9)(hk.Flatten()(x))
        return hk.Linear(5)(jax.nn.relu(x))

    f = hk.transform_with_state(f)
    # Not `init`, whose order of the layers `jit` would lose.
    return f._replace(apply=jax.jit(f.apply, static_argnums=4))


def test_haiku():
    f = haiku_network()
    params, state = f.init(jax.random.key(1), X, True)
    _, state = f.apply(params, state, None, X, True)
    model, template = linen("haiku")
    variables = convert.from_haiku((params, state), model, template, X)
    assert_close(call(model, variables, X)[0], f.apply(params, state, None, X, False)[0], 1e-11)
    for x in MORE:
        y, variables = call(model, variables, x, train=True)
        want, state = f.apply(params, state, None, x, True)
        assert_close(y, want, 1e-11)
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    fresh = tuple({name: zeros(v) for name, v in part.items()} for part in (params, state))
    back = convert.to_haiku(fresh, model, variables, X)
    assert jax.tree.structure(back) == jax.tree.structure(fresh)
    want = f.apply(params, state, None, X, False)[0]
    for got in (f.apply(*back, None, X, False)[0], call(model, variables, X)[0]):
        assert_close(got, want, 1e-11)
    again = convert.from_haiku(back, model, template, X)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_haikus_order():
    f = haiku_network()
    params, state = jax.tree.map(lambda v: v, f.init(jax.random.key(1), X, True))
    model, template = linen("haiku")
    with pytest.raises(ValueError, match=r"order of batch_norm, .*names="):
        convert.from_haiku((params, state), model, template, X)
    names = {
        "conv2_d": "Conv_0", "batch_norm": "BatchNorm_0", "depthwise_conv2_d": "Conv_1",
        "batch_norm_1": "BatchNorm_1", "conv2_d_transpose": "ConvTranspose_0",
        "batch_norm_2": "BatchNorm_2", "linear": "Dense_0",
        "linear_1": "Dense_1",
    }  # fmt: skip
    variables = convert.from_haiku((params, state), model, template, X, names=names)
    want = f.apply(params, state, None, X, True)[0]
    assert_close(call(model, variables, X, train=True)[0], want, 1e-11)


def equinox_network():
    eqx = pytest.importorskip("equinox")
    keys = iter(jax.random.split(jax.random.key(0), 9))
    norm = functools.partial(eqx.nn.BatchNorm, axis_name="batch", momentum=0.9, mode="batch")

    class Model(eqx.Module):
        blocks: list
        head: eqx.nn.Sequential

        def __init__(self):
            e = eqx.nn
            self.blocks = [
                (e.Conv2d(3, 6, 3, padding=1, use_bias=False, key=next(keys)), norm(6)),
                (e.Conv2d(6, 12, 3, padding=1, groups=6, key=next(keys)), norm(12)),
                (
                    e.ConvTranspose2d(
                        12, 8, (3, 4), 2, padding=1, output_padding=(1, 0), key=next(keys)
                    ),
                    norm(8),
                ),
            ]
            self.head = e.Sequential([
                e.Linear(512, 9, key=next(keys)),
                e.Lambda(jax.nn.relu), e.Linear(9, 5, key=next(keys)),
            ])  # fmt: skip

        def __call__(self, x, state, train):
            for layer, norm in self.blocks:
                x, state = norm(layer(x), state, inference=not train)
                x = jax.nn.relu(x)
            return self.head(x.reshape(-1)), state

    return eqx.nn.make_with_state(Model)()


def equinox_call(model, state, x, train=False):
    eqx = pytest.importorskip("equinox")

    @eqx.filter_jit
    def run(model, x, state):
        one = functools.partial(model, train=train)
        return jax.vmap(one, (0, None), (0, None), axis_name="batch")(x, state)

    return run(model, jnp.moveaxis(x, -1, 1), state)


def test_equinox():
    foreign, state = equinox_network()
    _, state = equinox_call(foreign, state, X, train=True)
    model, template = linen("equinox", pads=TORCH_PADS)
    said = {"flattened": {"head.layers[0]": SHAPE}}
    with pytest.raises(ValueError, match=r"head.layers\[0\].*flattened"):
        convert.from_equinox((foreign, state), model, template, X)
    variables = convert.from_equinox((foreign, state), model, template, X, **said)
    assert_close(call(model, variables, X)[0], equinox_call(foreign, state, X)[0], 1e-11)
    for x in MORE:
        y, variables = call(model, variables, x, train=True)
        want, state = equinox_call(foreign, state, x, train=True)
        assert_close(y, want, 1e-11)
    zeros = functools.partial(jax.tree.map, lambda v: v * 0 if hasattr(v, "dtype") else v)
    fresh = zeros(foreign), zeros(state)
    back = convert.to_equinox(fresh, model, variables, X, **said)
    want = equinox_call(foreign, state, X)[0]
    for got in (equinox_call(*back, X)[0], call(model, variables, X)[0]):
        assert_close(got, want, 1e-11)
    equinox_call(*fresh, X)  # its state is not used up
    again = convert.from_equinox(back, model, template, X, **said)
    assert_close(again, variables, 1e-12)


def test_flax():
    """From Linen to NNX, whose kernel of the ConvTranspose is stored otherwise, and back."""
    model, variables = linen("torch")
    other, template = of_nnx()
    for x in MORE:
        _, variables = call(model, variables, x, train=True)
    state = convert.from_flax((model, variables), other, template, X)
    for train in (False, True):
        want = call(model, variables, X, train)[0]
        assert_close(call(other, state, X, train)[0], want, 1e-11)
    fresh = linen("torch")[1]
    for back in (
        convert.from_flax((other, state), model, fresh, X),
        convert.to_flax((model, fresh, {"train": False}), other, state, X),
    ):
        jax.tree.map(np.testing.assert_array_equal, back, variables)


class Kernel(nnx.Variable):
    pass


class Dense(nnx.Module):
    """Its kernel is a Variable of the user's, and it has one that holds a dict."""

    def __init__(self, seed):
        self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        self.layer.kernel = Kernel(self.layer.kernel.get_value())
        self.tables = nnx.Variable({"offset": jnp.zeros((1, 2))})

    def __call__(self, x):
        return self.layer(x) + self.tables.get_value()["offset"]


def test_variables_of_other_types():
    x = jnp.ones((4, 3))
    (model, values), (_, template) = (nnx.split(Dense(seed)) for seed in range(2))
    state = convert.from_flax((model, values), model, template, x)
    assert_close(nnx.merge(model, state)(x), nnx.merge(model, values)(x), 1e-12)
