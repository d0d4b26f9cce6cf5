"""A network from Keras and back, beside Keras, whose BatchNorm rounds float64 to float32."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from layers import assert_close

import bn_jax.linen
from bn_jax.surgery import convert

pytestmark = pytest.mark.usefixtures("x64")
X, *MORE = np.random.default_rng(0).normal(size=(3, 6, 4, 4, 3))


class Net(nn.Module):
    """conv, depthwise conv, conv transposed, each with a BatchNorm; and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(
            bn_jax.linen.BatchNorm.like, "keras", use_running_average=not train, momentum=0.9
        )
        x = nn.relu(norm()(nn.Conv(6, (3, 3), use_bias=False)(x)))
        x = nn.relu(norm()(nn.Conv(12, (3, 3), feature_group_count=6)(x)))
        x = nn.relu(norm()(nn.ConvTranspose(8, (3, 4), (2, 2))(x)))
        x = nn.Dense(9)(x.reshape(len(x), -1))
        return nn.Dense(5)(nn.relu(x))


@pytest.fixture
def keras():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")  # read when Keras is first imported
        keras = pytest.importorskip("keras")
    # The policy too: Keras makes it of the floatx that it finds first.
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield keras
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def keras_network(keras, data_format, seed):
    keras.utils.set_random_seed(seed)
    k, same = keras.layers, {"padding": "same", "data_format": data_format}
    axis = {"axis": 1 if data_format == "channels_first" else -1, "momentum": 0.9}
    depthwise = k.DepthwiseConv2D(3, depth_multiplier=2, **same)
    block = keras.Sequential([depthwise, k.BatchNormalization(**axis), k.ReLU()], name="block")
    model = keras.Sequential([
        k.Conv2D(6, 3, use_bias=False, **same), k.BatchNormalization(**axis), k.ReLU(), block,
        k.Conv2DTranspose(8, (3, 4), 2, **same), k.BatchNormalization(**axis), k.ReLU(),
        k.Flatten(data_format="channels_last"), k.Dense(9, name="wide"), k.ReLU(), k.Dense(5),
    ])  # fmt: skip
    model.build((None, 3, 4, 4) if data_format == "channels_first" else (None, 4, 4, 3))
    return model


def keras_call(model, x, train=False):
    first = model.layers[0].data_format == "channels_first"
    with jax.numpy_rank_promotion("allow"):  # Keras adds biases of rank 1
        return np.asarray(model(np.moveaxis(x, -1, 1) if first else x, training=train))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_keras(keras, data_format):
    foreign, back = (keras_network(keras, data_format, seed) for seed in (0, 1))
    model = Net()
    template = model.init(jax.random.key(0), X)
    call = jax.jit(functools.partial(model.apply, mutable="batch_stats"), static_argnums=2)
    if data_format == "channels_first":
        with pytest.raises(ValueError, match=r"wide.*flattened"):
            convert.from_keras(foreign, model, template, X, unchecked=True)
    keras_call(foreign, X, train=True)
    variables = convert.from_keras(foreign, model, template, X)
    assert_close(model.apply(variables, X), keras_call(foreign, X), 1e-6)
    for x in MORE:
        y, new = call(variables, x, True)
        variables |= new
        assert_close(y, keras_call(foreign, x, train=True), 1e-6)
    back.set_weights(convert.to_keras(back, model, variables, X))
    for got in (keras_call(back, X), model.apply(variables, X)):
        assert_close(got, keras_call(foreign, X), 1e-6)
    again = convert.from_keras(back, model, template, X)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
