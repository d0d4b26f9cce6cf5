"""The tools that work on a checkpoint, on a Linen and on an NNX model from a file."""

import json
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from bn_jax.errors import UserError
from bn_jax.lab.tools import checkpoint, diagnose, fold, recalibrate
from bn_jax.surgery import fold as fold_model
from bn_jax.surgery import recalibrate as recalibrate_model

SOURCE = """
import flax.linen as nn
from flax import nnx


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.relu(nn.BatchNorm(use_running_average=not train)(nn.relu(x))))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x))
        return nn.BatchNorm(use_running_average=not train)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])

    def __call__(self, x, train):
        dense, norm = self.layers
        return norm(dense(x), use_running_average=not train)


linen, dropped, other = Linen(), Dropped(), 3


def make_nnx():
    return Nnx(nnx.Rngs(0))
"""
INPUTS = np.random.default_rng(0).normal(2, 3, (40, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A module, checkpoints of its models, and inputs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "foreign_models.py").write_text(textwrap.dedent(SOURCE))
    np.save(folder / "inputs.npy", INPUTS)
    np.save(folder / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(folder / "several.npz", a=INPUTS, b=INPUTS)
    (folder / "cut.npy").write_bytes((folder / "inputs.npy").read_bytes()[:-20])
    for name, array in (
        ("scalar", np.float32(3)), ("words", np.array(["a"])),
    ):  # fmt: skip
        np.save(folder / f"{name}.npy", array)
    sys.path.insert(0, str(folder))
    import foreign_models

    variables = foreign_models.linen.init(jax.random.key(0), INPUTS, train=False)
    # As a training state has it: more than the variables.
    checkpoint.save(folder / "linen", {**variables, "opt_state": {"m": jnp.ones(2)}, "step": 3})
    drop = foreign_models.dropped.init(jax.random.key(0), INPUTS, train=False)
    checkpoint.save(folder / "dropped", drop)
    checkpoint.save(folder / "make_nnx", nnx.split(foreign_models.make_nnx())[1])
    yield folder
    sys.path.remove(str(folder))


def settings(folder, name, **more):
    return {
        "model": f"foreign_models:{name}", "checkpoint": str(folder / name),
        "inputs": str(folder / "inputs.npy"), **more,
    }  # fmt: skip


def plain(variables):
    if isinstance(variables, nnx.State):
        variables = nnx.to_pure_dict(variables)
    return {"/".join(map(str, k)): v for k, v in traverse_util.flatten_dict(variables).items()}


def assert_same(a, b):
    a, b = plain(a), plain(b)
    assert a.keys() == b.keys()
    for name, v in a.items():
        np.testing.assert_array_equal(v, b[name], err_msg=name)


def written(path):
    return checkpoint._restore(str(path))


@pytest.mark.parametrize("name", ["linen", "make_nnx"])
def test_what_is_loaded_is_what_was_saved(folder, name):
    model, variables, inputs = checkpoint.load(checkpoint.Config(**settings(folder, name)))
    np.testing.assert_array_equal(inputs, INPUTS)
    if name == "linen":
        assert set(variables) == {"params", "batch_stats"}
        model.apply(variables, inputs, train=False)
    else:
        nnx.merge(model, variables)(inputs, train=False)
    assert_same(variables, {k: v for k, v in written(folder / name).items() if k in variables})


@pytest.mark.parametrize("name", ["linen", "make_nnx"])
def test_fold(folder, name, tmp_path, capsys):
    config = fold.Config(**settings(folder, name, out=str(tmp_path / "folded")))
    fold.run(config)
    expected = fold_model(*checkpoint.load(config), train=False)
    assert_same(written(tmp_path / "folded"), expected.variables)
    shown = capsys.readouterr().out
    if name == "linen":
        assert "BatchNorm_0 into Dense_0, which is before it" in shown
        assert "BatchNorm_1 stays: its input comes from relu" in shown
    else:
        assert "layers/1 into layers/0, which is before it" in shown


def test_fold_excludes(folder, tmp_path, capsys):
    out = {"out": str(tmp_path / "folded"), "exclude": ("*_0", "*_1")}
    folded = fold.run(fold.Config(**settings(folder, "linen", **out)))
    assert folded.pairs == []
    assert "BatchNorm_0 stays: it is excluded" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["linen", "make_nnx"])
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_recalibrate(folder, name, layer_by_layer, tmp_path):
    config = recalibrate.Config(
        **settings(folder, name, out=str(tmp_path / "new")), batch_size=15,
        layer_by_layer=layer_by_layer,
    )  # fmt: skip
    recalibrate.run(config)
    model, variables, inputs = checkpoint.load(config)
    batches = [inputs[:15], inputs[15:30], inputs[30:]]
    expected = recalibrate_model(
        model, variables, batches, layer_by_layer=layer_by_layer, train=True
    )
    assert_same(written(tmp_path / "new"), expected)


def test_recalibrate_with_dropout(folder, tmp_path):
    more = {"out": str(tmp_path / "new"), "rngs": "dropout=3", "only": "Batch*"}
    config = recalibrate.Config(**settings(folder, "dropped", **more))
    recalibrate.run(config)
    model, variables, inputs = checkpoint.load(config)
    rngs = {"dropout": jax.random.key(3)}
    expected = recalibrate_model(model, variables, [inputs], train=True, rngs=rngs)
    assert_same(written(tmp_path / "new"), expected)


def test_rngs_that_are_no_seeds(folder, tmp_path):
    more = {"out": str(tmp_path / "new")}
    with pytest.raises(UserError, match="--rngs=dropout: write keywords"):
        recalibrate.Config(**settings(folder, "linen", **more), rngs="dropout")
    with pytest.raises(UserError, match=r"--rngs=dropout='a': write seeds"):
        recalibrate.Config(**settings(folder, "linen", **more), rngs="dropout='a'")
    config = recalibrate.Config(**settings(folder, "make_nnx", **more), rngs="dropout=1")
    with pytest.raises(UserError, match="an NNX model has streams of its own"):
        recalibrate.run(config)


@pytest.mark.parametrize("name", ["linen", "make_nnx"])
def test_diagnose(folder, name, capsys):
    config = settings(folder, name)
    findings = diagnose.run(diagnose.Config(**config))
    assert "never_updated" in capsys.readouterr().out
    diagnose.run(diagnose.Config(**config, json=True))
    shown = json.loads(capsys.readouterr().out)
    assert [(f["kind"], tuple(f["path"])) for f in shown] == [
        (f.kind, f.path) for f in findings
    ]


def test_diagnose_after_recalibration(folder, tmp_path, capsys):
    config = settings(folder, "linen")
    model, variables, inputs = checkpoint.load(checkpoint.Config(**config))
    variables = recalibrate_model(model, variables, [inputs], train=True)
    checkpoint.save(tmp_path / "healthy", variables)
    assert [f.kind for f in diagnose.run(
        diagnose.Config(**config | {"checkpoint": str(tmp_path / "healthy")})
    )] == ["useless_bias"]  # fmt: skip
    assert "use_bias=False" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("model", "", "--model is missing"),
        ("model", "foreign_models", "--model=foreign_models"),
        ("model", "foreign_models:none", "has no attribute 'none'"),
        ("model", "no_such_module:none", "No module named"),
        ("model", "builtins:dict", "is a dict, not a Linen or NNX model"),
        ("model", "flax.linen:Dense", "--model=flax.linen:Dense is called without arguments"),
        ("checkpoint", "nowhere", "--checkpoint=nowhere: there is no such folder"),
        ("checkpoint", "folder", "no Orbax checkpoint"),
        ("checkpoint", "make_nnx", "has no params at its top: there are layers"),
        ("inputs", "nowhere.npy", "--inputs=nowhere.npy is not there"),
        ("inputs", "cut.npy", "is not an array that numpy.save wrote"),
        ("inputs", "several.npz", "has several arrays (a, b): save one as .npy"),
        ("inputs", "scalar.npy", "has shape (): [n, ...] is needed"),
        ("inputs", "words.npy", "is of <U1: save numbers, as float32"),
        ("inputs", "objects.npy", "not an array that numpy.save wrote"),
        ("evaluate", "train", "write keywords, as in train=True"),
        ("evaluate", "training=False", "unexpected keyword argument"),
        ("out", "linen", "name a folder that is not there yet"),
        ("out", "", "name a folder that is not there yet"),
        ("exclude", "Dense_0", "no BatchNorm fits 'Dense_0'"),
        ("out", "~nobody at all", "there is no such user"),
        ("out", "/proc/x", "--out=/proc/x: /proc cannot be written"),
    ],
)
def test_refusals(folder, tmp_path, flag, value, message):
    given = settings(folder, "linen", out=str(tmp_path / "out"))
    if value == "folder":
        value = str(tmp_path)
    elif value and (folder / value).exists():
        value = str(folder / value)
    value = (value,) if flag == "exclude" else value
    with pytest.raises(UserError) as raised:
        fold.run(fold.Config(**given | {flag: value}))
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["linen", "make_nnx"])
def test_a_checkpoint_of_another_model(folder, tmp_path, name):
    checkpoint.save(tmp_path / "other", {"params": {"Dense_9": {"kernel": jnp.ones((2, 2))}}})
    given = settings(folder, name) | {"checkpoint": str(tmp_path / "other")}
    config = fold.Config(**given, out=str(tmp_path / "out"))
    with pytest.raises(Exception, match=r"Dense_0|Dense_9") as raised:
        fold.run(config)
    assert type(raised.value).__name__ == "UserError"
