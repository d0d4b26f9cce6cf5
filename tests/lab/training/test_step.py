"""One step and its pieces against NumPy in float64, jax.grad written out, and the papers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.lab.training.metrics import correct, cross_entropy
from bn_jax.lab.training.optimizers import optimizer
from bn_jax.lab.training.step import evaluate_chunk, init_state, train_step
from bn_jax.linen import BatchNorm

# Model and optimizer are static.
init = jax.jit(init_state, static_argnums=(1, 2))
step = jax.jit(train_step, static_argnums=(3, 4))
evaluate = jax.jit(evaluate_chunk, static_argnums=1)

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(12, 5)).astype(np.float32)
LABELS = RNG.integers(0, 3, 12)


def softmax_oracle(outputs, labels):
    outputs = np.asarray(outputs, np.float64)
    shifted = outputs - outputs.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels]


def sigmoid_oracle(outputs, labels):
    z = np.asarray(outputs, np.float64)[:, 0]
    return np.logaddexp(0, np.where(labels == 1, -z, z))


@pytest.mark.parametrize("size", [1, 30, 1e4])
def test_cross_entropy_of_a_softmax(size):
    outputs = (size * RNG.normal(size=(50, 7))).astype(np.float32)
    labels = np.arange(50) % 7
    ours = cross_entropy(jnp.array(outputs), jnp.array(labels))
    assert ours.shape == (50,)
    rounding = 2e-7 * np.abs(outputs).max()
    expected = softmax_oracle(outputs, labels)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("size", [1, 30, 1e4])
def test_cross_entropy_of_a_sigmoid(size):
    outputs = (size * RNG.normal(size=(50, 1))).astype(np.float32)
    labels = np.arange(50) % 2
    ours = cross_entropy(jnp.array(outputs), jnp.array(labels))
    assert ours.shape == (50,)
    np.testing.assert_allclose(ours, sigmoid_oracle(outputs, labels), rtol=1e-5, atol=1e-6)


def test_correct_answers():
    outputs = jnp.array([[1.0, 2, 0], [3, -1, 2], [0, 0, -1], [5, 6, 7]])
    np.testing.assert_array_equal(
        correct(outputs, jnp.array([1, 2, 0, 2])), [True, False, True, True]
    )
    outputs = jnp.array([[0.1], [-0.1], [7.0], [-9.0]])
    np.testing.assert_array_equal(
        correct(outputs, jnp.array([1, 0, 0, 1])), [True, True, False, False]
    )


class Linear(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(self.outputs)(x)


def loss_by_hand(params, x, y):
    """Softmax regression's mean loss, from the kernel and the bias."""
    z = x @ params["kernel"] + params["bias"][None]
    return (jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, y[:, None], -1)[:, 0]).mean()


def sgd(p, grads, rate):
    return p - rate * grads[-1]


def sgd_momentum(p, grads, rate):
    """Polyak 1964: what is subtracted is a sum of gradients, each 0.9 of its age."""
    age = range(len(grads) - 1, -1, -1)
    return p - rate * sum(0.9**a * g for a, g in zip(age, grads, strict=True))


def adam(p, grads, rate):
    """Kingma & Ba 2015, Algorithm 1."""
    t, m, v = len(grads), 0, 0
    for g in grads:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    return p - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def sgd_nesterov(p, grads, rate):
    """Sutskever et al. 2013: the sum as it will be after one step more of this gradient."""
    m = 0
    for g in grads:
        m = 0.9 * m + g
    return p - rate * (0.9 * m + grads[-1])


def rmsprop(p, grads, rate):
    """Keras' defaults, which the tutorials use: decay .9, epsilon 1e-7 beside the root."""
    v = 0
    for g in grads:
        v = 0.9 * v + 0.1 * g**2
    return p - rate * grads[-1] / (np.sqrt(v) + 1e-7)


@pytest.mark.parametrize("rule", [sgd, sgd_momentum, sgd_nesterov, rmsprop, adam])
def test_steps_are_those_of_the_gradient_written_out(rule):
    model, tx = Linear(3), optimizer(rule.__name__, 0.3)
    x, y = jnp.array(INPUTS), jnp.array(LABELS)
    state = init(jax.random.key(0), model, tx, x)
    params = state.params["Dense_0"]
    by_hand, history = jax.jit(jax.value_and_grad(loss_by_hand)), []
    for count in (1, 2, 3):
        loss, grads = by_hand(params, x, y)
        history.append(grads)
        params = {
            k: rule(p, [np.asarray(g[k]) for g in history], 0.3) for k, p in params.items()
        }
        state, means = step(state, x, y, model, tx)
        assert means.loss == pytest.approx(float(loss), rel=1e-5)
        assert state.step == count
        for k, p in params.items():
            found = state.params["Dense_0"][k]
            np.testing.assert_allclose(found, p, rtol=1e-4, atol=1e-5, err_msg=k)
    assert state.batch_stats == {}


class AllKinds(nn.Module):
    """A convolution, a norm and a dense layer, of which nothing starts at 0 or 1."""

    @nn.compact
    def __call__(self, x, *, train):
        some = nn.initializers.normal(1.0)
        x = nn.Conv(4, (3, 3), bias_init=some)(x)
        x = BatchNorm(use_running_average=not train, scale_init=some, bias_init=some)(x)
        return nn.Dense(2, bias_init=some)(x.reshape(len(x), -1))


def test_init_scale_multiplies_kernels_alone():
    images = jnp.zeros((1, 4, 4, 2))
    one, many = (
        init(jax.random.key(1), AllKinds(), optax.sgd(0.1), images, scale).params
        for scale in (1.0, 2.5)
    )
    names = []
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(many), strict=True
    ):
        names.append(path[-1].key)
        factor = 2.5 if names[-1] == "kernel" else 1
        np.testing.assert_allclose(b, factor * a, rtol=2e-7 * (factor > 1))
        assert (np.asarray(a) != 0).any()
    assert sorted(names) == ["bias", "bias", "bias", "kernel", "kernel", "scale"]


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(3)(BatchNorm(momentum=0.9, use_running_average=not train)(x))


@pytest.fixture(scope="module")
def normalised():
    """Model, optimizer and a state after one step on inputs far from 0."""
    model, tx = Normalised(), optax.sgd(0.1)
    state = init(jax.random.key(0), model, tx, INPUTS)
    state, _ = step(state, 5 + 2 * INPUTS, jnp.array(LABELS), model, tx)
    return model, state


def test_a_step_moves_the_running_statistics_once(normalised):
    _, state = normalised
    x = 5 + 2 * INPUTS.astype(np.float64)
    (stats,) = state.batch_stats.values()
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var(0), rtol=1e-5)


def test_evaluation_is_a_sum_with_running_statistics(normalised):
    model, state = normalised
    metrics = evaluate(state, model, INPUTS, LABELS, np.ones(12, bool))
    (stats,) = state.batch_stats.values()
    norm, dense = state.params["BatchNorm_0"], state.params["Dense_0"]
    z = (INPUTS - stats["mean"][None]) / np.sqrt(stats["var"] + 1e-5)[None]
    z = z * norm["scale"][None] + norm["bias"][None]
    z = np.asarray(z @ dense["kernel"] + dense["bias"][None])
    assert metrics.loss == pytest.approx(softmax_oracle(z, LABELS).sum(), rel=1e-5)
    assert metrics.accuracy == (z.argmax(-1) == LABELS).sum()
    assert metrics.loss.shape == metrics.accuracy.shape == ()


@pytest.mark.parametrize("filling", [0, 1e30, np.nan])
@pytest.mark.parametrize("label", [0, 2])
def test_evaluation_ignores_the_filling(normalised, filling, label):
    model, state = normalised
    counted = np.arange(12) % 3 != 0
    x = np.where(counted[:, None], INPUTS, np.float32(filling))
    y = np.where(counted, LABELS, label)
    part = evaluate(state, model, INPUTS[counted], LABELS[counted], np.ones(8, bool))
    filled = evaluate(state, model, x, y, counted)
    assert filled.loss == pytest.approx(float(part.loss), rel=1e-5)
    assert filled.accuracy == part.accuracy
