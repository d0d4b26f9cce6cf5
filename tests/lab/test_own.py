"""A comparison of the user's own model on the user's own data."""

import functools
import io
from contextlib import redirect_stderr, redirect_stdout

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx

from bn_jax import lab
from bn_jax.errors import UserError
from bn_jax.lab.comparison import Config, run
from bn_jax.lab.data import load as load_data
from bn_jax.lab.training.optimizers import parsed

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (120, 6))
Y = (X[:, 0] > 3).astype(int) + (X[:, 1] > 3)
SMALL = {"steps": 4, "eval_every": 2, "seeds": 2, "learning_rates": 0.1, "batch_size": 20}


class Net(nn.Module):
    """As `bn_jax.lab.models.MLP`, with Flax's BatchNorm."""

    num_outputs: int = 3

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        glorot = nn.initializers.xavier_normal()
        x = nn.Dense(8, use_bias=False, kernel_init=glorot)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.num_outputs)(nn.sigmoid(x))


class NnxNet(nnx.Module):
    def __init__(self, din, dout, *, rngs):
        self.first, self.norm = nnx.Linear(din, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, dout, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


class Tokens(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, tokens, training=False):
        x = nn.Embed(50, 8)(tokens).mean(1)
        x = nn.Dropout(0.2, deterministic=not training)(x)
        return nn.Dense(self.num_classes)(nn.BatchNorm(use_running_average=not training)(x))


def quietly(function, *args, **flags):
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return function(*args, **flags)


def compare(model, data, folder, **flags):
    return quietly(lab.compare, model, data, **SMALL | flags, workdir=str(folder))


def losses(result, arm):
    return np.array([r.test_loss for r in result.records if r.arm == arm])


def test_a_copy_of_a_network_that_is_built_in_trains_as_that(tmp_path):
    ours = compare("mlp", "digits", tmp_path / "a", features=8, arms=("bn",))
    own = compare(Net, "digits", tmp_path / "b", arms=("flax", "bn"))
    np.testing.assert_allclose(losses(own, "bn"), losses(ours, "bn"), rtol=2e-4)
    np.testing.assert_allclose(losses(own, "flax"), losses(own, "bn"), rtol=2e-4)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Of an NNX model with dropout, on arrays."""
    folder = tmp_path_factory.mktemp("result") / "w"
    rates = {"learning_rates": (0.1, 0.3)}
    optimizer = functools.partial(optax.sgd, momentum=0.9)
    return compare(
        NnxNet, (X, Y), folder, arms=("none", "layer"), optimizer=optimizer, target=0.4, **rates
    )


def test_what_comes_back(result, tmp_path):
    assert [arm.arm for arm in result.arms] == list(result.frame["arm"]) == ["none", "layer"]
    assert result.speedups[0].arm.arm == "layer"
    rows = result.records_frame
    assert len(rows) == 2 * 2 * 2 * 3
    first = rows[(rows.arm == "none") & (rows.seed == 1) & (rows.step == 4)].iloc[0]
    (record,) = [
        r for r in result.records if r.run == ("none", r.point, 1) and r.learning_rate == 0.1
    ]
    assert first.test_loss == record.test_loss[-1]
    assert any("layer" in line for line in result.sentences)
    shown = result._repr_html_()
    assert "<table" in shown
    assert "data:image/png" in shown
    result.save(tmp_path / "out", formats=("svg", "pdf"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"learning_curves.svg", "learning_curves.pdf", "records.csv", "arms.csv"} <= names
    saved = pd.read_csv(tmp_path / "out" / "records.csv")
    pd.testing.assert_frame_equal(saved, rows, check_dtype=False)
    assert lab.load(result.folder).summary == result.summary


def test_runs_of_two_days_are_one_comparison(result, tmp_path):
    other = compare(NnxNet, (X, Y), tmp_path / "w", arms=("rms",), target=0.4, seeds=1)
    both = lab.join(result, other, names={"rms": "other"}, folder=tmp_path / "both")
    assert [arm.arm for arm in both.arms] == ["none", "layer", "other"]
    assert both.speedups[0] == result.speedups[0]
    assert "unequal" in both.summary["seeds"]
    assert (tmp_path / "both" / "report.html").exists()
    with pytest.raises(UserError, match="arm none has the same runs in both"):
        lab.join(result, result, folder=tmp_path / "c")
    elsewhere = compare(NnxNet, (X, Y), tmp_path / "d", arms=("rms",), target=0.5, seeds=1)
    with pytest.raises(UserError, match=r"targets differ, 0\.4 and 0\.5"):
        lab.join(result, elsewhere, folder=tmp_path / "e")


def test_numbers_are_predicted(tmp_path):
    """R squared follows from the loss, by its definition."""
    y = X[:, 0] - 2 * X[:, 1]
    found = compare(
        functools.partial(Net), {"x_train": X, "y_train": y}, tmp_path / "w", arms=("bn",)
    )
    variance = np.var(np.asarray(load_data((X, y)).test.labels))
    for r in found.records:
        np.testing.assert_allclose(r.test_accuracy, 1 - np.array(r.test_loss) / variance, 1e-3)


def absolute(outputs, labels):
    return jnp.abs(outputs["value"][:, 0] - labels)


class Several(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = Net(1)(x, train)
        return {"value": y, "square": y**2}


def test_several_outputs_with_a_loss_and_a_metric_of_ones_own(tmp_path):
    given = {"loss": absolute, "metric": lambda outputs, labels: -absolute(outputs, labels)}
    found = compare(Several(), (X, X[:, 0]), tmp_path / "w", arms=("bn",), **given)
    for r in found.records:
        np.testing.assert_allclose(r.test_accuracy, -np.array(r.test_loss), rtol=1e-5)


def test_tokens(tmp_path):
    tokens = RNG.integers(0, 50, (120, 7))
    found = compare(Tokens, (tokens, Y), tmp_path / "w", arms=("bn",))
    assert all(r.diverged_at is None for r in found.records)


def test_everything_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import flax.linen as nn\nimport optax\n"
        "class Net(nn.Module):\n"
        "    classes: int\n"
        "    @nn.compact\n"
        "    def __call__(self, x, *, deterministic):\n"
        "        x = nn.BatchNorm(use_running_average=deterministic)(nn.Dense(4)(x))\n"
        "        return nn.Dense(self.classes)(x)\n"
        "def descent(rate):\n    return optax.lion(rate)\n"
    )
    np.savez(tmp_path / "mine.npz", x_train=X, y_train=Y, x_test=X, y_test=Y)
    monkeypatch.chdir(tmp_path)
    config = Config(
        model="mine.py:Net", dataset="mine.npz", optimizer="mine:descent", arms=("none", "dyt"),
        **SMALL,
    )  # fmt: skip
    summary = quietly(run, config)
    assert (summary["model"], summary["dataset"]) == ("mine.py:Net", "mine.npz")
    assert [arm["arm"] for arm in summary["arms"]] == ["none", "dyt"]


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(7)(nn.BatchNorm(use_running_average=not train)(x))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "nowhere.py:Net"}, r"--model=nowhere\.py:Net: there is no file"),
        ({"model": "json:Net"}, "json has no Net"),
        ({"model": "mymodel"}, "--model: unknown 'mymodel'"),
        ({"model": 3}, "which is no model"),
        ({"model": Wide()}, r"shape \[2, 7\].*3 classes.*\[2, 3\]"),
        ({"model": Plain()}, "--arms: none: "),  # no BatchNorm to replace
        ({"arms": ("none", "batch")}, "--arms: unknown 'batch', choose from none, bn"),
        ({"features": (3,)}, "--features: --model=Net says that itself"),
        ({"parallel": "pmap"}, "--parallel=pmap: the BatchNorms of --model=Net"),
        ({"optimizer": "adamv"}, "--optimizer=adamv: choose from .*adamw"),
        ({"optimizer": "adamw(decay=1)"}, "adamw has no decay"),
        ({"optimizer": "adamw(1)"}, r"write a name, or name\(option=value\)"),
        ({"optimizer": lambda rate: rate}, "makes a float"),
        ({"optimizer": "adamw", "weight_decay": 0.1}, "--weight_decay"),
        ({"loss": "squared_error"}, "the labels are classes, choose cross_entropy"),
        ({"metric": "r3"}, "choose from accuracy, r2"),
        ({"data": (X, Y[:-1])}, "x_train has 120 examples and y_train 119"),
        ({"data": "mine.csv:frame"}, "there is no module"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(given, said, tmp_path):
    model, data = given.pop("model", Net), given.pop("data", (X, Y))
    with pytest.raises(UserError, match=said) as raised:
        compare(model, data, tmp_path / "w", **given)
    assert "\n" not in str(raised.value)


def test_an_optimizer_of_optax_with_options():
    params = {"w": jnp.arange(3.0)}

    def first_update(tx):
        return tx.update({"w": jnp.ones(3)}, tx.init(params), params)[0]

    alias = parsed("adamw(weight_decay=0.05, b1=0.8)")
    wanted = first_update(optax.adamw(0.1, weight_decay=0.05, b1=0.8))
    jax.tree.map(np.testing.assert_array_equal, first_update(alias(0.1)), wanted)
    assert parsed("adam") == "adam"
