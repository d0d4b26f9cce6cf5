"""Networks exported to ONNX by jax2onnx compute in onnxruntime what they compute here."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax
import bn_jax.linen
import bn_jax.nnx

jax2onnx = pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

RNG = np.random.default_rng(0)
IMAGES = np.float32(RNG.normal(size=(4, 8, 8, 3)))
NAMES = ["BatchNorm", "GhostBatchNorm", "BatchRenorm"]
pytestmark = pytest.mark.filterwarnings("ignore")


def assert_exports(f, *inputs, symbolic=True):
    """Of a function of arrays that have the batch as their first axis."""
    want = f(*inputs)
    shapes = [("B" if symbolic else x.shape[0], *x.shape[1:]) for x in inputs]
    with jax.numpy_rank_promotion("allow"):  # jax2onnx has layers of its own
        model = jax2onnx.to_onnx(f, shapes)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, inputs, strict=True)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


class LinenNet(nn.Module):
    norm: type
    convolves: bool
    activation: bool

    @nn.compact
    def __call__(self, x, train):
        for width in (4, 6):
            x = nn.Conv(width, (3, 3))(x) if self.convolves else nn.Dense(width)(x)
            fused = {"activation": nn.relu} if self.activation else {}
            x = self.norm(use_running_average=not train, momentum=0.5, **fused)(x)
        return nn.Dense(2)(x.mean((1, 2)) if self.convolves else x)


class NNXNet(nnx.Module):
    def __init__(self, norm, convolves, activation, rngs):
        self.convolves = convolves
        fused = {"activation": nnx.relu} if activation else {}
        self.layers = nnx.List()
        for before, width in ((3, 4), (4, 6)):
            layer = (
                nnx.Conv(before, width, (3, 3), rngs=rngs)
                if convolves
                else nnx.Linear(before, width, rngs=rngs)
            )
            self.layers += [layer, norm(width, momentum=0.5, rngs=rngs, **fused)]
        self.last = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x.mean((1, 2)) if self.convolves else x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("convolves", [True, False])
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("home", ["linen", "nnx"])
def test_trained_networks(home, name, convolves, activation):
    x = IMAGES if convolves else IMAGES[:, 0, 0]
    if home == "nnx":
        net = NNXNet(getattr(bn_jax.nnx, name), convolves, activation, nnx.Rngs(0))
        net(x)  # moves the statistics
        net.eval()
        assert_exports(net, x)
    else:
        net = LinenNet(getattr(bn_jax.linen, name), convolves, activation)
        variables = net.init(jax.random.key(0), x, train=True)
        variables |= net.apply(variables, x, train=True, mutable=["batch_stats"])[1]
        assert_exports(lambda x: net.apply(variables, x, train=False), x)


def test_given_statistics():
    mean, var, scale, bias = np.float32(RNG.random(size=(4, 3)))
    assert_exports(lambda x: bn_jax.normalize(x, mean, var, scale, bias), IMAGES)
    stats = np.float32(RNG.random(size=(2, 3)))
    domain = jnp.array([0, 1, 1, 0])
    assert_exports(
        lambda x: bn_jax.domain_normalize(x, domain, stats, stats + 1), IMAGES, symbolic=False
    )


def test_statistics_of_the_batch():
    assert_exports(lambda x: bn_jax.batch_norm(x)[0], IMAGES, symbolic=False)
