"""The tools that work on a checkpoint, on a Linen and on an NNX model from a file."""

import json
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from bn_jax.surgery import fold as fold_model
from bn_jax.surgery import recalibrate as recalibrate_model
from experiments import checkpoint, diagnose, fold, recalibrate

SOURCE = """
import flax.linen as nn
from flax import nnx


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.relu(nn.BatchNorm(use_running_average=not train)(nn.relu(x))))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])

    def __call__(self, x, train):
        dense, norm = self.layers
        return norm(dense(x), use_running_average=not train)


linen, other = Linen(), 3


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
    sys.path.insert(0, str(folder))
    import foreign_models

    variables = foreign_models.linen.init(jax.random.key(0), INPUTS, train=False)
    # As a training state has it: more than the variables.
    checkpoint.save(folder / "linen", {**variables, "opt_state": {"m": jnp.ones(2)}, "step": 3})
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
    config = checkpoint.WritingConfig(**settings(folder, name, out=str(tmp_path / "folded")))
    fold.run(config)
    expected = fold_model(*checkpoint.load(config), train=False)
    assert_same(written(tmp_path / "folded"), expected.variables)
    shown = capsys.readouterr().out
    if name == "linen":
        assert "BatchNorm_0 into Dense_0, which is before it" in shown
        assert "BatchNorm_1 stays: its input comes from relu" in shown
    else:
        assert "layers/1 into layers/0, which is before it" in shown


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
        ("inputs", "nowhere.npy", "not an array that numpy.save wrote"),
        ("inputs", "objects.npy", "not an array that numpy.save wrote"),
        ("evaluate", "train", "write keywords, as in train=True"),
        ("evaluate", "train=f()", "write keywords, as in train=True"),
        ("evaluate", "training=False", "unexpected keyword argument"),
        ("out", "linen", "name a folder that is not there yet"),
        ("out", "", "name a folder that is not there yet"),
        ("out", "~", "name a folder that is not there yet"),
    ],
)
def test_refusals(folder, server, tmp_path, flag, value, message):
    given = settings(folder, "linen", out=str(tmp_path / "out"))
    if value == "folder":
        value = str(tmp_path)
    elif value and (folder / value).exists():
        value = str(folder / value)
    given[flag] = value
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + (
        "from experiments import checkpoint, flags, fold\n"
        "flags.main(checkpoint.WritingConfig, fold.run)\n"
    )
    finished = server.run(*(f"--{k}={v}" for k, v in given.items()), code=code)
    assert finished.code == 2
    assert message in finished.err.splitlines()[-1]


@pytest.mark.parametrize("name", ["linen", "make_nnx"])
def test_a_checkpoint_of_another_model(folder, tmp_path, name):
    checkpoint.save(tmp_path / "other", {"params": {"Dense_9": {"kernel": jnp.ones((2, 2))}}})
    given = settings(folder, name) | {"checkpoint": str(tmp_path / "other")}
    config = fold.checkpoint.WritingConfig(**given, out=str(tmp_path / "out"))
    with pytest.raises(Exception, match=r"Dense_0|Dense_9") as raised:
        fold.run(config)
    assert type(raised.value).__name__ == "UserError"
