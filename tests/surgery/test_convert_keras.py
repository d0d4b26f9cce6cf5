"""Networks from Keras and back, beside Keras, whose BatchNorm rounds float64 to float32."""

import jax
import numpy as np
import pytest
from convert_networks import MORE, SHAPE, X, call, linen
from layers import assert_close

from bn_jax.surgery import convert

pytestmark = pytest.mark.usefixtures("x64")


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
    block = keras.Sequential(
        [
            k.DepthwiseConv2D(3, depth_multiplier=2, **same),
            k.BatchNormalization(**axis),
            k.ReLU(),
        ],
        name="block",
    )
    model = keras.Sequential([
        k.Conv2D(6, 3, use_bias=False, **same), k.BatchNormalization(**axis), k.ReLU(), block,
        k.Conv2DTranspose(8, (3, 4), 2, **same), k.BatchNormalization(**axis), k.ReLU(),
        k.Dropout(0.5, name="off"), k.Flatten(data_format="channels_last"),
        k.Dense(9, name="wide"), k.ReLU(), k.Dense(5),
    ])  # fmt: skip
    model.build((None, 3, 4, 4) if data_format == "channels_first" else (None, 4, 4, 3))
    model.get_layer("off").rate = 0
    return model


def keras_call(model, x, train=False):
    first = model.layers[0].data_format == "channels_first"
    with jax.numpy_rank_promotion("allow"):  # Keras adds biases of rank 1
        return np.asarray(model(np.moveaxis(x, -1, 1) if first else x, training=train))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_keras(keras, data_format):
    foreign, back = (keras_network(keras, data_format, seed) for seed in (0, 1))
    model, template = linen("keras", epsilon=1e-3)
    said = {"flattened": {"wide": SHAPE}} if data_format == "channels_first" else {}
    if data_format == "channels_first":
        with pytest.raises(ValueError, match=r"wide.*flattened"):
            convert.from_keras(foreign, model, template, X)
    keras_call(foreign, X, train=True)
    variables = convert.from_keras(foreign, model, template, X, **said)
    assert_close(call(model, variables, X)[0], keras_call(foreign, X), 1e-6)
    for x in MORE:
        y, variables = call(model, variables, x, train=True)
        assert_close(y, keras_call(foreign, x, train=True), 1e-6)
    back.set_weights(convert.to_keras(back, model, variables, X, **said))
    for got in (keras_call(back, X), call(model, variables, X)[0]):
        assert_close(got, keras_call(foreign, X), 1e-6)
    again = convert.from_keras(back, model, template, X, **said)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
