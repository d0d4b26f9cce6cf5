"""Published settings: what an experiment trains is what its source states."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contract import parsed

from bn_jax.errors import UserError
from bn_jax.lab.arms import Arm, build_run, in_steps, load_data
from bn_jax.lab.comparison import Config
from bn_jax.lab.data import Dataset, Split, batch_indices
from bn_jax.lab.fields import kinds
from bn_jax.lab.models import Inception
from bn_jax.lab.training.run import Swept
from bn_jax.lab.training.schedules import schedule
from bn_jax.linen import BatchNorm
from experiments import (
    batch_size,
    cifar_cnn,
    cifar_speedrun,
    circles,
    first_layer,
    inception,
    learning_rates,
    lstm,
    mnist_sigmoid,
    regularisation,
)
from experiments import cifar_speedrun_recipe as recipe

IMAGES = Split(jnp.zeros((50_000, 32, 32, 3), jnp.uint8), jnp.zeros(50_000, jnp.int32))
CIFAR = Dataset(*[IMAGES] * 3, 10, jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
COMMAND = re.compile(r"^    (python -m (?:.*\\\n)*.*)$", re.M)


def documented(module):
    """The configs of the commands in the module's docstring."""
    commands = (text.replace("\\\n", "") for text in COMMAND.findall(module.__doc__))
    return [parsed(module.Config, text) for text in commands]


def has(config, **settings):
    assert {k: getattr(config, k) for k in settings} == settings


def test_circles():
    config, arms = circles.Config(), circles.arms()
    # 100 epochs over all 500 points, as they are, the last 20 of an epoch left out.
    has(
        config, dataset="circles", features=(50,), activation="relu", scaling="raw",
        optimizer="sgd_momentum", learning_rates=(0.01,), batch_size=32, seeds=100, target=0.8,
        steps=1500, eval_every=15, validation_fraction=0, is_whole=True,
    )  # fmt: skip
    assert {*config.arms} <= {*arms}
    has(arms["bn_no_affine"].norm(), use_scale=False, use_bias=False)
    has(arms["bn_before"].config(config), places=("before",), momentums=(0.99,))
    has(arms["bn_input"].config(config), places=("input",))
    has(arms["bn_momentum_0"].config(config), places=("after",), momentums=(0.0,))


def test_mnist_sigmoid():
    config = mnist_sigmoid.Config()
    has(
        config, dataset="mnist", scaling="binary", model="mlp", features=(100, 100, 100),
        activation="sigmoid", arms=("none", "bn"), places=("before",), batch_size=60,
        steps=50_000, seeds=5, dropout=None, l2=0, weight_decay=0,
    )  # fmt: skip
    assert mnist_sigmoid.is_the_sources(config)
    for change in ({"dataset": "digits"}, {"steps": 500}, {"features": (50,)}, {"seeds": 1}):
        assert not mnist_sigmoid.is_the_sources(dataclasses.replace(config, **change))


def test_cifar_cnn():
    a, b = cifar_cnn.Config(), cifar_cnn.Config(network="b")
    has(
        a, dataset="cifar10", model="cifar_a", features=None, optimizer="adam",
        schedule="constant", batch_size=256, epochs=300, patience=5, scaling="unit",
        places=("after",), augment=(), is_whole=True,
    )  # fmt: skip
    has(in_steps(a, CIFAR), steps=300 * 195, eval_every=195)
    has(
        b, dataset="cifar10", model="cifar_b", features=None, optimizer="rmsprop",
        learning_rates=(1e-4,), batch_size=32, epochs=50, patience=None, places=("before",),
        augment=("shift", "flip"), is_whole=True,
    )  # fmt: skip
    decay = schedule(b.schedule, 78_100, decay_steps=b.decay_steps, decay_rate=b.decay_rate)
    assert decay(100_000) == pytest.approx(1 / 1.1)  # Keras: rate / (1 + 1e-6 t)
    for given, own in (((1e-4,), (1e-3,)), ((3e-4, 1e-3), (3e-3, 1e-2))):
        config = dataclasses.replace(b, learning_rates=given)
        arms = cifar_cnn.arms(config)
        assert arms["none"].config(config) == config
        has(arms["bn"].config(config), dropout=0, learning_rates=own)
    assert cifar_cnn.Config(network="b", augment=()).augment == ()


def test_first_layer():
    config = first_layer.Config()
    arms = first_layer.arms(config)
    has(config, dataset="mnist", model="mlp", features=(300, 100), scaling="raw")
    assert config.max_runs_at_once == 1
    assert len(config.arms) == 8
    for name in config.arms:
        own = arms[name].config(config)
        assert own.activation == ("elu" if name.endswith("_elu") else "relu")
        assert own.scaling == ("standard" if name.startswith("standard") else "raw")
        assert (arms[name].norm is not None) == name.startswith("bn_")
        if name.startswith("bn_"):
            assert own.places == ("input", name.split("_")[1])
    assert arms["none"].config(config).learning_rates == (1e-3, 3e-3, 1e-2)


def test_an_arm_has_its_own_scaling():
    config = first_layer.Config(dataset="digits", features=(8, 4))
    dataset, arms = load_data(config), first_layer.arms(config)
    raw, standard = (build_run(config, arms[n], dataset) for n in ("none", "standard"))
    pixels = np.asarray(dataset.train.inputs, np.float32)
    np.testing.assert_array_equal(raw.scaled(dataset.train.inputs), pixels)
    every = load_data(Config(dataset="digits", validation_fraction=0)).train.inputs
    exact = (pixels - np.mean(every)) / np.std(np.asarray(every, np.float64))
    np.testing.assert_allclose(standard.scaled(dataset.train.inputs), exact, atol=1e-5)
    binary = dataclasses.replace(config, scaling="binary")
    with pytest.raises(UserError, match="--scaling=binary: standard arms"):
        build_run(binary, arms["standard"], load_data(binary))


def test_lstm():
    config = lstm.Config()
    has(
        config, dataset="mnist", features=(100,), batch_size=100, optimizer="rmsprop",
        learning_rates=(1e-3,), clip=1,
    )  # fmt: skip
    assert config.validation_fraction * 60_000 == 10_000
    tutorial, full = documented(lstm)
    has(tutorial, arms=("none", "lstm_bn"), features=(32,))
    has(full, read="pixels", steps=lstm.STEPS, features=(100,), permuted=False, quick=False)
    assert full.steps * full.batch_size == 200 * 50_000 == 200 * full.eval_every * 100
    permuted = lstm.Config(read="pixels", permuted=True)
    arms = lstm.arms(permuted)
    for name in config.arms:
        assert (arms[name].model["read"], arms[name].model["permutation_seed"]) == ("pixels", 0)
    scales = [arms[f"recurrent_{s}"].model["initial_scale"] for s in (".1", "1")]
    assert scales == [0.1, 1]
    assert arms["recurrent_1"].config(permuted).places == ("recurrent",)
    assert lstm.arms(config)["none"].model["permutation_seed"] is None
    digits = dataclasses.replace(tutorial, dataset="digits")
    model = build_run(digits, lstm.arms(digits)["lstm_bn"], load_data(digits)).model(Swept())
    assert (model.features, model.places, model.norm.func) == (32, ("output",), BatchNorm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": (3, 4)}, "--model=lstm has one width"),
        ({"places": ("before",)}, "choose from output, recurrent"),
        ({"dataset": "circles"}, "an LSTM reads images"),
    ],
)
def test_flags_that_an_lstm_has_otherwise(changes, message):
    config = Config(model="lstm", **{"dataset": "digits"} | changes)
    with pytest.raises(UserError, match=message):
        build_run(config, Arm(BatchNorm), load_data(config))


def test_inception():
    config = inception.Config()
    arms = inception.arms(config)
    own = {name: arm.config(config) for name, arm in arms.items()}
    has(
        config, learning_rates=(0.0015,), batch_size=32, optimizer="sgd_momentum", dropout=0.4,
        ensemble=6, arms=("inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid"),
    )  # fmt: skip
    # 4 % every 8 epochs of 1,281,167 images, over 6 million steps of 32.
    epochs = 6e6 * 32 / 1_281_167
    np.testing.assert_allclose(config.decay_rate**3, 0.96 ** (epochs / 8), rtol=0.01)
    for name in ("inception", "bn_baseline", "inception_sigmoid"):
        has(own[name], learning_rates=(0.0015,), dropout=0.4)
        assert own[name].augment == ("shift", "flip", "distort")
    for name, rate in (("bn_x5", 0.0075), ("bn_x30", 0.045), ("bn_x5_sigmoid", 0.0075)):
        has(own[name], dropout=0, augment=("shift", "flip"), l2=config.l2 / 5)
        np.testing.assert_allclose(own[name].learning_rates, [rate])
        np.testing.assert_allclose(own[name].decay_rate, config.decay_rate**6)
    np.testing.assert_allclose(own["inception_x5"].learning_rates, [0.0075])
    assert own["inception_x5"].dropout == 0.4
    sigmoid = {name for name, c in own.items() if c.activation == "sigmoid"}
    assert sigmoid == {"bn_x5_sigmoid", "inception_sigmoid"}
    assert {n for n in config.arms if arms[n].norm} == {*config.arms} - {"inception"}
    assert arms["bn_baseline"].model == arms["inception"].model


def test_local_response_normalisation_and_shuffling_are_flags_of_inception():
    def normed(**flags):
        known = inception.arms(inception.Config(**flags)).items()
        return {name for name, arm in known if arm.model.get("local_response_norm")}

    assert normed() == {"inception", "inception_x5", "inception_sigmoid", "bn_baseline"}
    assert normed(local_response_norm=False) == set()
    assert normed(local_response_norm=True) == {*inception.arms(inception.Config())}
    config = inception.Config(shuffle=False)
    members = [arm for arm, _ in inception.members(config).values()]
    assert {arm.shuffle for arm in (*inception.arms(config).values(), *members)} == {False}
    config = Config(train_examples=100, batch_size=32, features=(2,))
    dataset, key = load_data(config), jax.random.key(3)
    order = batch_indices(key, 0, 6, 100, 32)  # 3 batches in an epoch
    for shuffle, expected in ((True, order), (False, np.tile(order[:3], (2, 1)))):
        run = build_run(config, Arm(None, shuffle=shuffle), dataset)
        np.testing.assert_array_equal(run.batches(key, 0, 6), expected)


def test_the_network_of_inceptions_source_is_a_command():
    (config,) = documented(inception)
    arms = inception.arms(config)
    assert Inception(**arms["bn_x30"].model) == Inception()
    assert Inception(**arms["inception"].model) == Inception(local_response_norm=True)
    assert abs(config.decay_steps - 8 * 1_281_167 // config.batch_size) < 2
    assert (config.decay_rate, arms["bn_x30"].config(config).decay_rate) == (0.96, 0.96**6)
    assert config.steps == 1e6 * inception.PUBLISHED["inception"][0]
    config = dataclasses.replace(config, dataset="digits")
    with pytest.raises(UserError, match="images of 8x8 are too small for stem='imagenet'"):
        build_run(config, arms["bn_x5"], load_data(config))
    narrow = inception.arms(inception.Config())["bn"]
    model = Inception(10, norm=narrow.norm, **narrow.model)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    init = functools.partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), image)["params"]
    assert sum(v.size for v in jax.tree.leaves(params)) == 287_946


def test_the_networks_of_the_ensemble():
    config = inception.Config(seed=3)
    members = inception.members(config)
    seeds = {arm.config(config).dropout: list(seeds) for arm, seeds in members.values()}
    assert seeds == {0.05: [3, 5, 7], 0.1: [4, 6, 8]}
    for arm, _ in members.values():
        assert arm.model["per_activation_last"]
        has(arm.config(config), init_scales=(1.5,))
        np.testing.assert_allclose(arm.config(config).learning_rates, 0.045)
    assert len(inception.members(inception.Config(ensemble=1))) == 1


def test_cifar_speedrun():
    config = cifar_speedrun.Config()
    has(config, batch_size=1024, seeds=20, target=0.94, is_whole=True)
    assert config.steps == math.ceil(9.9 * (50_000 // 1024))
    assert cifar_speedrun.Config(seeds=1, dtype="bfloat16").is_whole
    quick = cifar_speedrun.Config(quick=True)
    assert not quick.is_whole
    assert not cifar_speedrun.Config(views=1).is_whole
    assert quick.steps / (1347 // quick.batch_size) == pytest.approx(9.9, abs=0.05)
    arms = cifar_speedrun.arms(config)
    assert tuple(arms) == config.arms
    source = {"epsilon": 1e-12, "use_scale": False, "unbiased": True}
    norms = {"scale": {"use_scale": True}, "ghost_32": {"group_size": 32}}
    norms |= {"ghost_128": {"group_size": 128}}
    changed = {
        "momentum_0.9": {"momentums": (0.9,)}, "momentum_0.99": {"momentums": (0.99,)},
        "bias_rate_1": {"bias_rate": 1.0},
        "none": {"learning_rates": (0.345, 1.15, 3.45, 11.5)},
    }  # fmt: skip
    for name, arm in arms.items():
        assert dict(arm.changes) == changed.get(name, {})
        if name != "none":
            assert arm.norm.keywords == source | norms.get(name, {})
    config = cifar_speedrun.Config(quick=True, features=(8,))
    dataset = recipe.load(config)
    run = recipe.build(config, cifar_speedrun.arms(config)["none"], dataset)
    state = jax.eval_shape(run.init, jax.random.key(0), Swept(), dataset.train.inputs)
    params = state.train.params
    assert {k: sorted(v) for k, v in params.items()} == {
        "Whitening_0": ["bias"], "Conv_0": ["bias", "kernel"], "Conv_1": ["bias", "kernel"],
        "Dense_0": ["kernel"],
    }  # fmt: skip
    groups = recipe.groups(params)
    assert groups["Whitening_0"]["bias"] == "whitening"
    assert {*groups["Conv_0"].values()} == {"rest"}


def test_batch_size():
    config = batch_size.Config()
    has(config, batch_sizes=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024))
    assert config.arms == ("none", "bn", "ghost", "renorm", "group", "layer")
    # A quick run with batches of 8 has 640 steps, which is the default that --quick changes.
    for given in ({}, {"quick": True}, {"quick": True, "batch_sizes": (8,)}):
        config = batch_size.Config(**given)
        arms = batch_size.arms(config)
        for cell in batch_size.cells(config):
            own = arms[cell.name].config(config)
            assert own.batch_size == cell.batch_size
            assert own.steps * own.batch_size == config.steps * config.batch_size
            assert own.steps // own.eval_every == config.steps // config.eval_every
    config = batch_size.Config(
        arms=("none",), batch_sizes=(8, 512), schedule="step", warmup_steps=64, decay_steps=8
    )
    own = {n: arm.config(config) for n, arm in batch_size.arms(config).items()}
    steps = {n: (c.steps, c.warmup_steps, c.decay_steps) for n, c in own.items()}
    assert steps == {"none 8": (2560, 256, 32), "none 512": (40, 4, 1)}
    config = batch_size.Config(arms=("bn", "ghost"), batch_sizes=(1, 16, 32))
    names = [cell.name for cell in batch_size.cells(config)]
    assert names == ["bn 1", "bn 16", "bn 32", "ghost 32"]  # not where it is the batch
    layer = batch_size.norms(1300)["renorm"].norm()
    with jax.numpy_rank_promotion("allow"):  # ramps of Ioffe 2017, for a hundredth of the steps
        assert [float(layer.r_max(n)) for n in (0, 50, 400, 1300)] == [1, 1, 3, 3]
        assert [float(layer.d_max(n)) for n in (0, 50, 250, 1300)] == [0, 0, 5, 5]


def test_the_grids_of_learning_rates_and_regularisation():
    config = learning_rates.Config()
    has(config, depths=(3, 5, 10, 20), activations=("relu", "sigmoid", "tanh"))
    assert config.arms == ("none", "bn")
    config = learning_rates.Config(arms=("bn", "layer"), depths=(1, 4), width=7)
    arms = learning_rates.arms(config)
    assert len(arms) == 2 * 3 * 2
    assert arms["layer tanh 4"].model["features"] == (7, 7, 7, 7)
    has(arms["layer tanh 4"].config(config), activation="tanh")
    assert arms["layer tanh 4"].norm.__name__ == "LayerNorm"
    config = regularisation.Config()
    has(config, dataset="mnist", train_examples=500, seeds=10)
    assert 0.0 in config.dropouts
    assert 0.0 in config.l2s
    # The quick size changes l2s, not what an arm says itself.
    config = regularisation.Config(quick=True, dropouts=(0.0, 0.5), l2s=(0.0, 0.1))
    arms = regularisation.arms(config)
    assert len(arms) == 2 * 2 * 2
    has(arms["bn, dropout 0.5, L2 0.1"].config(config), dropout=0.5, l2=0.1)
    assert arms["none, dropout 0, L2 0"].config(config).dropout == 0.0


REFUSED = [
    (batch_size, {"batch_sizes": ()}, "--batch_sizes=: name one or more"),
    (batch_size, {"batch_sizes": (2, 2)}, "--batch_sizes=2,2"),
    (batch_size, {"batch_sizes": (3,)}, "3 does not divide the 5120 examples"),
    (cifar_cnn, {"network": "c"}, "--network=c: choose from a, b"),
    (cifar_speedrun, {"dtype": "float16"}, "--dtype=float16: choose from float32, bfloat16"),
    (cifar_speedrun, {"views": 3}, "--views=3: choose from 1, 2, 6"),
    (inception, {"ensemble": -1}, "--ensemble=-1: it must be at least 0 and at most 1000"),
    (inception, {"width": 0.0}, "--width=0.0: it must be above 0"),
    (learning_rates, {"depths": (3, 0)}, "--depths=0: it must be at least 1 and at most 1000"),
    (learning_rates, {"target": None}, "--target: it needs a value"),
    (lstm, {"read": "words"}, "--read=words: choose from rows, pixels"),
    (mnist_sigmoid, {"features": None}, "--features: it needs a value"),
    (
        regularisation,
        {"dropouts": (0.0, 1.0)},
        "--dropouts=1.0: it must be at least 0 and",
    ),
    (regularisation, {"l2s": ()}, "--l2s=: name one or more"),
]


FIXED = [
    (batch_size, "epochs", 3),
    (cifar_speedrun, "optimizer", "adam"),
    (learning_rates, "features", (3,)),
    (mnist_sigmoid, "model", "cnn"),
    (regularisation, "l2", 0.3),
]


@pytest.mark.parametrize(("module", "name", "value"), FIXED)
def test_flags_that_an_experiment_has_not(module, name, value):
    """They are unknown on the command line and in Python, and keep their value."""
    assert name not in kinds(module.Config)
    assert getattr(module.Config(), name) == getattr(Config(), name) or name == "model"
    with pytest.raises(TypeError, match=name):
        module.Config(**{name: value})


@pytest.mark.parametrize(("module", "given", "message"), REFUSED)
def test_flags_that_make_no_sense(module, given, message):
    with pytest.raises(UserError, match=message):
        module.Config(**given)


def test_values_that_need_the_data_or_the_arms():
    for given, message in (
        ({"dataset": "circles", "batch_size": 10}, "--dataset=circles: choose one of images"),
        ({"dataset": "digits", "translate": 8, "batch_size": 64}, "--translate=8: .* 8 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            recipe.load(cifar_speedrun.Config(**given))
    config = batch_size.Config(
        batch_sizes=(1,), arms=("bn",), steps=1, eval_every=1, batch_size=1
    )
    with pytest.raises(UserError, match="every arm is refused"):
        batch_size.run(config)
