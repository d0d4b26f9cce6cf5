import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.lab.models.lstm import LSTM
from bn_jax.lab.training.step import init_state, unguarded_step
from bn_jax.linen import BatchNorm
from experiments.lstm_gradients import gradient_norms

N, HEIGHT, WIDTH, CHANNELS, FEATURES, CLASSES = 6, 3, 4, 2, 5, 3
IMAGES = jax.random.normal(jax.random.key(0), (N, HEIGHT, WIDTH, CHANNELS))
LABELS = jnp.arange(N) % CLASSES
MOMENTUM = 0.8
EVERYWHERE = {
    "norm": functools.partial(BatchNorm, momentum=MOMENTUM),
    "places": ("recurrent", "output"),
}
build = functools.partial(LSTM, FEATURES, CLASSES)


# These programs run once, for milliseconds, and take seconds to optimise.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def initialised(model):
    return jit(functools.partial(model.init, train=False))(jax.random.key(1), IMAGES[:1])


def randomised(variables):
    """Every scale, bias, mean and variance of a size of its own."""
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(2)
    return tree.unflatten([v * rng.uniform(0.5, 1.5, v.shape) + rng.uniform(0, 0.5, v.shape)
                           for v in leaves])  # fmt: skip


def evaluate(model, variables, images=IMAGES):
    return jit(functools.partial(model.apply, train=False))(variables, images)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(variables, steps, nudge=0.0, running=False):
    """Logits, and the statistics used, of the batch-normalised LSTM, step by step in float64.

    steps `[T, n, inputs]`; nudge `[T, n, features]` is added to the hidden states.
    """
    params, stats = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))
    used = {name: {"mean": [], "var": []} for name in ("hidden", "input", "cell")}
    p = params["steps"]

    def norm(v, own, kept):
        mean, var = (kept["mean"], kept["var"]) if running else (v.mean(0), v.var(0))
        return own["scale"] * (v - mean) / np.sqrt(var + 1e-5) + own.get("bias", 0), mean, var

    def in_step(name, v, t):
        kept = {k: s[t] for k, s in stats["steps"][f"{name}_norm"].items()}
        y, mean, var = norm(v, p[f"{name}_norm"], kept)
        used[name]["mean"].append(mean)
        used[name]["var"].append(var)
        return y

    h = c = np.zeros((steps.shape[1], FEATURES))
    for t, x in enumerate(np.float64(steps)):
        recurrent = in_step("hidden", h @ p["recurrent"]["kernel"], t)
        gates = recurrent + in_step("input", x @ params["input"]["kernel"], t) + p["bias"]
        f, i, o, g = (gates[:, k * FEATURES : (k + 1) * FEATURES] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(in_step("cell", c, t))
        h = h + (0 if np.isscalar(nudge) else nudge[t])
    h, *_ = norm(h, params["BatchNorm_0"], stats["BatchNorm_0"])
    return h @ params["output"]["kernel"] + params["output"]["bias"], used


def sequence(images, steps):
    return np.moveaxis(np.asarray(images).reshape(len(images), steps, -1), 1, 0)


def test_training_is_that_of_the_equations():
    model = build(**EVERYWHERE)
    variables = randomised(initialised(model))
    run = jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    outputs, updates = run(variables, IMAGES)
    expected, used = oracle(variables, sequence(IMAGES, HEIGHT))
    np.testing.assert_allclose(outputs, expected, rtol=1e-3, atol=1e-4)
    for name, of_batch in used.items():
        for statistic, v in of_batch.items():
            old = variables["batch_stats"]["steps"][f"{name}_norm"][statistic]
            np.testing.assert_allclose(
                updates["batch_stats"]["steps"][f"{name}_norm"][statistic],
                MOMENTUM * old + (1 - MOMENTUM) * np.stack(v),
                rtol=1e-4, atol=1e-5,
            )  # fmt: skip


def test_inference_is_that_of_the_equations():
    model = build(read="pixels", **EVERYWHERE)
    variables = randomised(initialised(model))
    expected, _ = oracle(variables, sequence(IMAGES, HEIGHT * WIDTH), running=True)
    np.testing.assert_allclose(evaluate(model, variables), expected, rtol=1e-4, atol=1e-5)


def test_without_a_norm_it_is_flaxs_lstm():
    model = build()
    params = initialised(model)["params"]
    gates = ["f", "i", "o", "g"]
    own = params["steps"]
    split = functools.partial(jnp.split, indices_or_sections=4, axis=1)
    cell = {}
    for gate, w, r, b in zip(
        gates, split(params["input"]["kernel"]), split(own["recurrent"]["kernel"]),
        split(own["bias"]), strict=True,
    ):  # fmt: skip
        cell |= {f"i{gate}": {"kernel": w}, f"h{gate}": {"kernel": r, "bias": b[0]}}
    rnn = nn.RNN(nn.LSTMCell(FEATURES))
    states = rnn.apply({"params": {"cell": cell}}, IMAGES.reshape(N, HEIGHT, -1))
    expected = nn.Dense(CLASSES).apply({"params": params["output"]}, states[:, -1])
    np.testing.assert_allclose(
        evaluate(model, {"params": params}), expected, rtol=1e-5, atol=1e-6
    )


def test_variables():
    """Every step has statistics, and none has parameters, of its own."""
    variables = initialised(build(read="pixels", **EVERYWHERE))
    assert set(variables) == {"params", "batch_stats"}
    for name, width in {"hidden": 4, "input": 4, "cell": 1}.items():
        features = width * FEATURES
        for v in variables["batch_stats"]["steps"][f"{name}_norm"].values():
            assert v.shape == (HEIGHT * WIDTH, features)
        own = variables["params"]["steps"][f"{name}_norm"]
        assert set(own) == ({"scale", "bias"} if name == "cell" else {"scale"})
        np.testing.assert_array_equal(own["scale"], np.full(features, 0.1, np.float32))


def test_kernels_start_orthogonal_and_the_forget_gate_open():
    params = initialised(build())["params"]
    recurrent = params["steps"]["recurrent"]["kernel"]
    for kernel in (params["input"]["kernel"], recurrent[:, : 3 * FEATURES]):
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(len(kernel)), atol=1e-5)
    np.testing.assert_array_equal(recurrent[:, 3 * FEATURES :], np.eye(FEATURES))
    ones = np.repeat([1, 0, 0, 0], FEATURES)
    np.testing.assert_array_equal(params["steps"]["bias"][0], ones)


def test_one_permutation_in_training_and_evaluation():
    model = build()
    variables = initialised(model)
    order = jax.random.permutation(jax.random.key(3), HEIGHT * WIDTH)
    assert not (order == jnp.arange(HEIGHT * WIDTH)).all()
    images = IMAGES.reshape(N, -1, CHANNELS)[:, order].reshape(IMAGES.shape)

    @jit
    def permuted(images):
        m = model.clone(permutation_seed=3)
        return [m.apply(variables, images, train=train) for train in (True, False)]

    expected = evaluate(model, variables, images)
    np.testing.assert_allclose(permuted(IMAGES), [expected] * 2, rtol=1e-5, atol=1e-6)


def test_gradient_norms_against_differences_of_the_equations():
    model = build(**EVERYWHERE)
    variables = randomised(initialised(model))
    steps, size = sequence(IMAGES, HEIGHT), 1e-5

    def loss(nudge):
        logits, _ = oracle(variables, steps, nudge)
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        return -np.log(shifted[np.arange(N), LABELS] / shifted.sum(1)).sum()

    gradient = np.zeros((HEIGHT, N, FEATURES))
    for index in np.ndindex(gradient.shape):
        nudge = np.zeros_like(gradient)
        nudge[index] = size
        gradient[index] = (loss(nudge) - loss(-nudge)) / (2 * size)
    expected = np.sqrt((gradient**2).sum(2).mean(1))
    norms = jit(functools.partial(gradient_norms, model))(variables, IMAGES, LABELS)
    np.testing.assert_allclose(norms, expected, rtol=1e-3)


def test_gradients_too_small_for_their_squares():
    model = build()
    variables = initialised(model)

    def norms(factor):
        def loss(outputs, labels):
            return factor * outputs[:, 0]

        return gradient_norms(model, variables, IMAGES, LABELS, loss)

    f = jit(norms)
    np.testing.assert_allclose(f(1e-30), 1e-30 * np.float64(f(1.0)), rtol=1e-5)
    assert not f(0.0).any()


def test_noise_saves_the_gradient_of_images_that_begin_alike():
    """The variance of the first steps is 0, and 1/sqrt(0 + epsilon) is 316."""
    model = build(**EVERYWHERE)
    variables, images = initialised(model), IMAGES.at[:, :2].set(0)

    def growth(noise):
        run = jit(functools.partial(gradient_norms, model.clone(noise=noise)))
        norms = run(variables, images, LABELS, key=jax.random.key(2))
        return norms[0] / norms[2]

    without = growth(0.0)
    assert 1e3 < without < np.inf
    assert growth(0.1) < 10


@pytest.mark.parametrize("field", ["noise", "dropout"])
def test_noise_and_dropout_are_of_training_only(field):
    model = build(**{field: 0.5})
    variables = initialised(build())

    @jit
    def run(images):
        keys = jax.random.split(jax.random.key(3))
        trained = [
            model.apply(variables, images, train=True, rngs={"dropout": key}) for key in keys
        ]
        return *trained, model.apply(variables, images, train=False)

    a, b, evaluated = run(IMAGES)
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(evaluated, evaluate(build(), variables))


def test_a_sweep_over_momenta():
    """Momentum is traced; it decides the statistics, and nothing else of a step."""
    tx = optax.sgd(0.1)

    def step(momentum):
        norm = functools.partial(BatchNorm, momentum=momentum)
        model = build(norm=norm, places=("recurrent",), noise=0.1)
        before = init_state(jax.random.key(1), model, tx, IMAGES[:1])
        after, _, _ = unguarded_step(before, IMAGES, LABELS, model, tx, key=jax.random.key(2))
        return before.batch_stats, after

    before, after = jit(jax.vmap(step))(jnp.array([0.0, 0.5, 1.0]))
    for start, end in zip(
        jax.tree.leaves(before), jax.tree.leaves(after.batch_stats), strict=True
    ):
        np.testing.assert_allclose(end[1], (end[0] + start[0]) / 2, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(end[2], start[2])
        assert not np.allclose(end[0], start[0])
    for p in jax.tree.leaves(after.params):
        np.testing.assert_allclose(p[0], p[2], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "images", "message"),
    [
        ({}, IMAGES[..., 0], r"\(6, 3, 4\)"),
        ({"read": "columns"}, IMAGES, "read='columns': choose from rows, pixels"),
        ({"places": ("before",)}, IMAGES, "'before': choose from output, recurrent"),
    ],
)
def test_mistakes(fields, images, message):
    with pytest.raises(ValueError, match=message):
        build(**fields).init(jax.random.key(1), images, train=False)
